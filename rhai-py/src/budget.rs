//! What one call may use: operations, wall-clock time, memory and stack.
//!
//! Rhai counts operations per `GlobalRuntimeState`, and a closure called by a native function gets a clone of it, so
//! loops inside `filter` or `sort` escape its own count. This budget is counted per thread and sees every operation.

use crate::memory;
use pyo3::PyErr;
use rhai::Dynamic;
use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

/// The clock is read once in so many operations; reading it costs about as much as an operation.
const OPERATIONS_PER_CLOCK_READ: u64 = 32;

/// Why a budget ended a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    Operations,
    Time,
    Memory,
    Stack,
    /// A Python callable raised; the exception is in `HOST_ERROR`.
    Host,
}

impl Stop {
    pub fn name(self) -> &'static str {
        match self {
            Self::Operations => "operations",
            Self::Time => "time",
            Self::Memory => "memory",
            Self::Stack => "stack",
            Self::Host => "host",
        }
    }
}

/// What a script is given. `stack_reserve_bytes` must stay free below it, for native functions and for dropping values.
#[derive(Clone, Copy)]
pub struct Allowance {
    pub operations: u64,
    pub time: Duration,
    pub memory_bytes: usize,
    pub stack_reserve_bytes: usize,
}

#[derive(Clone, Copy)]
struct Budget {
    operations_left: u64,
    deadline: Option<Instant>,
    memory_ceiling: isize,
    stack_floor: usize,
    stop: Option<Stop>,
}

impl Budget {
    const IDLE: Self = Self {
        operations_left: u64::MAX,
        deadline: None,
        memory_ceiling: isize::MAX,
        stack_floor: 0,
        stop: None,
    };
}

thread_local! {
    static CURRENT: Cell<Budget> = const { Cell::new(Budget::IDLE) };
    static HOST_ERROR: RefCell<Option<PyErr>> = const { RefCell::new(None) };
}

/// A budget in force on this thread; dropping it puts back the one that was there before.
pub struct Running {
    outer: Budget,
}

impl Running {
    pub fn start(allowance: Allowance) -> Self {
        let left = stacker::remaining_stack().unwrap_or(allowance.stack_reserve_bytes);
        let usable = left.saturating_sub(allowance.stack_reserve_bytes);
        let inner = Budget {
            operations_left: allowance.operations,
            deadline: Instant::now().checked_add(allowance.time),
            memory_ceiling: memory::live_bytes().saturating_add_unsigned(allowance.memory_bytes),
            stack_floor: stack_address().saturating_sub(usable),
            stop: None,
        };
        HOST_ERROR.take();
        Self { outer: CURRENT.replace(inner) }
    }

    /// Why the script was stopped, if it was. Rhai's `sort` swallows errors of its comparer, so a stop must be asked
    /// for even where the script returned a value.
    pub fn stopped(&self) -> Option<Stop> {
        CURRENT.get().stop
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        CURRENT.set(self.outer);
    }
}

/// Lift the budget of this thread while Python code runs.
///
/// A callable may switch greenlets, and another greenlet may run a script on the same thread meanwhile: a budget left
/// in place would be charged to, or restored by, the wrong one.
pub fn suspended<T>(work: impl FnOnce() -> T) -> T {
    let mine = CURRENT.replace(Budget::IDLE);
    let result = work();
    CURRENT.set(mine);
    result
}

/// Stop the script because a Python callable raised. The error is kept apart, since Rhai may swallow what it is given.
pub fn stop_for_host_error(error: PyErr) {
    HOST_ERROR.set(Some(error));
    let mut budget = CURRENT.get();
    budget.stop.get_or_insert(Stop::Host);
    CURRENT.set(budget);
}

pub fn take_host_error() -> Option<PyErr> {
    HOST_ERROR.take()
}

/// Charge one operation: the hook that Rhai calls before each one. A value ends the script.
pub fn charge(_rhai_count: u64) -> Option<Dynamic> {
    let mut budget = CURRENT.get();
    if budget.stop.is_none() {
        budget.stop = exceeded(&mut budget);
        CURRENT.set(budget);
    }
    budget.stop.map(|reason| reason.name().into())
}

#[inline]
fn exceeded(budget: &mut Budget) -> Option<Stop> {
    if budget.operations_left == 0 {
        return Some(Stop::Operations);
    }
    budget.operations_left -= 1;
    if stack_address() < budget.stack_floor {
        return Some(Stop::Stack);
    }
    if memory::live_bytes() > budget.memory_ceiling {
        return Some(Stop::Memory);
    }
    if budget.operations_left.is_multiple_of(OPERATIONS_PER_CLOCK_READ) {
        if let Some(deadline) = budget.deadline {
            return (Instant::now() >= deadline).then_some(Stop::Time);
        }
    }
    None
}

/// The address of something on the top of the stack.
#[inline(always)]
fn stack_address() -> usize {
    let marker = 0_u8;
    std::ptr::from_ref(std::hint::black_box(&marker)) as usize
}
