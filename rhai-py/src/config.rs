//! The limits of an engine, checked when it is made, and the stack that they ask for.

use crate::budget::Allowance;
use pyo3::exceptions::PyValueError;
use pyo3::PyResult;
use std::time::Duration;

const MAX_CONTAINER_ITEMS: usize = 50_000;
const MAX_TIMEOUT_S: f64 = 3600.0;

/// Stack that a running script uses besides what its values ask for.
const WORK_STACK_BYTES: usize = 1024 * 1024;

/// Of that, what stays free for native functions and Python callables.
const NATIVE_STACK_BYTES: usize = 128 * 1024;

/// Dropping a value takes at most this for each level that it nests: measured at 130 for an array, 225 for a map.
const DROP_BYTES_PER_LEVEL: usize = 320;

#[derive(Clone, Debug)]
pub struct Config {
    pub max_operations: u64,
    pub max_call_levels: usize,
    pub max_expr_depth: (usize, usize),
    pub max_variables: usize,
    pub max_functions: usize,
    pub max_string_bytes: usize,
    pub max_array_items: usize,
    pub max_map_items: usize,
    pub max_source_bytes: usize,
    pub max_memory_bytes: usize,
    pub timeout: Duration,
    pub strict_variables: bool,
}

impl Config {
    /// Refuse limits that Rhai would read as "no limit" (zero) or that no stack could carry.
    pub fn check(self) -> PyResult<Self> {
        in_range("max_operations", self.max_operations, u64::MAX)?;
        for (name, value, most) in [
            ("max_call_levels", self.max_call_levels, 256),
            ("max_expr_depth", self.max_expr_depth.0, 128),
            ("max_expr_depth", self.max_expr_depth.1, 128),
            ("max_variables", self.max_variables, 65_536),
            ("max_functions", self.max_functions, 65_536),
            ("max_string_bytes", self.max_string_bytes, 1 << 30),
            ("max_array_items", self.max_array_items, MAX_CONTAINER_ITEMS),
            ("max_map_items", self.max_map_items, MAX_CONTAINER_ITEMS),
            ("max_source_bytes", self.max_source_bytes, 1 << 20),
            ("max_memory_bytes", self.max_memory_bytes, 1 << 40),
        ] {
            in_range(name, value as u64, most as u64)?;
        }
        Ok(self)
    }

    /// The same limits for the host's own prelude, which may be long.
    pub fn for_prelude(&self) -> Self {
        Self { max_functions: 65_536, max_source_bytes: 1 << 20, ..self.clone() }
    }

    /// What a call may use, and the stack in bytes that it needs.
    pub fn allowance(&self) -> (Allowance, usize) {
        let nested_bytes = (self.max_array_items + self.max_map_items) * DROP_BYTES_PER_LEVEL;
        let allowance = Allowance {
            operations: self.max_operations,
            time: self.timeout,
            memory_bytes: self.max_memory_bytes,
            stack_reserve_bytes: NATIVE_STACK_BYTES + nested_bytes,
        };
        (allowance, WORK_STACK_BYTES + nested_bytes)
    }
}

/// Turn seconds into a duration.
pub fn timeout(seconds: f64) -> PyResult<Duration> {
    if seconds > 0.0 && seconds <= MAX_TIMEOUT_S {
        return Ok(Duration::from_secs_f64(seconds));
    }
    Err(PyValueError::new_err(format!(
        "timeout_s must be above 0 and at most {MAX_TIMEOUT_S}, not {seconds}"
    )))
}

fn in_range(name: &str, value: u64, most: u64) -> PyResult<()> {
    if (1..=most).contains(&value) {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("{name} must be from 1 to {most}, not {value}")))
}
