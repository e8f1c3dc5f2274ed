//! Which lines of a script ran.

use crate::errors::LINES_BEFORE_PRELUDE;
use rhai::debugger::{DebuggerCommand, DebuggerEvent};
use rhai::Engine;
use std::sync::{Arc, Mutex, PoisonError};

/// Of a longer trace the older half is dropped: what decided is at its end.
const MAX_LINES: usize = 10_000;

/// The lines that an engine ran, filled while it runs.
#[derive(Clone, Default)]
pub struct Lines(Arc<Mutex<Vec<usize>>>);

impl Lines {
    pub fn take(&self) -> Vec<usize> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn push(&self, line: usize) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.last() == Some(&line) {
            return;
        }
        if lines.len() == MAX_LINES {
            lines.drain(..MAX_LINES / 2);
        }
        lines.push(line);
    }
}

/// Make an engine note the line of every statement and expression of the script itself.
pub fn record_lines(engine: &mut Engine) -> Lines {
    let lines = Lines::default();
    let seen = lines.clone();
    #[allow(deprecated)] // not deprecated but volatile, says Rhai
    engine.register_debugger(
        |_, debugger| debugger,
        move |_, event, _, _, position| {
            let runs = matches!(event, DebuggerEvent::Start | DebuggerEvent::Step);
            // Behind the script's own lines come those of the prelude and of the call expressions of list functions.
            match position.line() {
                Some(line) if runs && line <= LINES_BEFORE_PRELUDE => seen.push(line),
                _ => {}
            }
            Ok(DebuggerCommand::StepInto)
        },
    );
    lines
}
