//! Work that recurses, on a stack that is large enough for it.

use crate::errors;
use std::panic::{catch_unwind, AssertUnwindSafe};

/// Run `work` here if the current stack has `bytes` left, else on a thread of its own. A panic becomes its message.
///
/// A thread, not a switched stack: Python checks the stack pointer against the bounds of the thread, and greenlets
/// copy the thread's stack, so a Python callable must never run on memory that is neither.
pub fn with_stack<T: Send>(bytes: usize, work: impl FnOnce() -> T + Send) -> Result<T, String> {
    if stacker::remaining_stack().is_some_and(|left| left >= bytes) {
        return catch_unwind(AssertUnwindSafe(work)).map_err(|payload| errors::panic_message(&*payload));
    }
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("rhai".to_owned())
            .stack_size(bytes + SLACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|error| format!("cannot start a thread with {bytes} bytes of stack: {error}"))?
            .join()
            .map_err(|payload| errors::panic_message(&*payload))
    })
}

/// What a new thread uses before `work` starts.
const SLACK_BYTES: usize = 64 * 1024;
