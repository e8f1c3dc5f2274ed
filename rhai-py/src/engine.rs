//! The Python class Engine: limits, host functions, and the way from a source to a Script.

use crate::callback::Callback;
use crate::compile;
use crate::config::{self, Config};
use crate::frozen::{self, Frozen};
use crate::sandbox::{self, Host};
use crate::script::{self, Script};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use rhai::AST;
use std::sync::{Arc, Mutex, PoisonError};

/// Compiles scripts and holds what they may use.
#[pyclass(frozen, module = "rhai")]
pub struct Engine {
    config: Config,
    host: Mutex<Host>,
    prelude: AST,
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (
        *,
        max_operations = 50_000,
        max_call_levels = 16,
        max_expr_depth = (64, 32),
        max_variables = 64,
        max_functions = 32,
        max_string_bytes = 65_536,
        max_array_items = 1024,
        max_map_items = 256,
        max_source_bytes = 65_536,
        max_memory_bytes = 33_554_432,
        timeout_s = 0.02,
        strict_variables = true,
        prelude = None,
        print = None,
        debug = None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        max_operations: u64,
        max_call_levels: usize,
        max_expr_depth: (usize, usize),
        max_variables: usize,
        max_functions: usize,
        max_string_bytes: usize,
        max_array_items: usize,
        max_map_items: usize,
        max_source_bytes: usize,
        max_memory_bytes: usize,
        timeout_s: f64,
        strict_variables: bool,
        prelude: Option<&str>,
        print: Option<Py<PyAny>>,
        debug: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let config = Config {
            max_operations,
            max_call_levels,
            max_expr_depth,
            max_variables,
            max_functions,
            max_string_bytes,
            max_array_items,
            max_map_items,
            max_source_bytes,
            max_memory_bytes,
            timeout: config::timeout(timeout_s)?,
            strict_variables,
        }
        .check()?;
        let host = Host { callbacks: Vec::new(), print: print.map(Arc::new), debug: debug.map(Arc::new) };
        let parser = sandbox::engine(&config.for_prelude(), &host, []);
        let prelude = compile::parse_prelude(py, &parser, prelude.unwrap_or_default())?;
        let prelude = compile::merge(py, &AST::empty(), &prelude, None)?;
        Ok(Self { config, host: Mutex::new(host), prelude })
    }

    /// Parse a script.
    #[pyo3(signature = (source, *, name = None))]
    fn compile(&self, py: Python<'_>, source: &str, name: Option<String>) -> PyResult<Script> {
        let host = self.host.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let parser = sandbox::engine(&self.config, &host, []);
        let ast = compile::parse(py, &parser, &self.config, source, name.as_deref())?;
        let functions = script::functions(&ast);
        let merged = compile::merge(py, &self.prelude, &ast, name.as_deref())?;
        Ok(Script::new(self.config.clone(), host, merged, functions, name))
    }

    /// Make a Python callable a function of every script compiled from here on.
    fn register(&self, name: &str, callable: &Bound<'_, PyAny>) -> PyResult<()> {
        if !callable.is_callable() {
            return Err(PyTypeError::new_err(format!("the function {name:?} is not callable")));
        }
        if !rhai::is_valid_identifier(name) {
            return Err(PyValueError::new_err(format!("{name:?} is not a Rhai identifier")));
        }
        let callback = Arc::new(Callback::new(name, callable)?);
        let mut host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        host.callbacks.retain(|known| known.name != name);
        host.callbacks.push(callback);
        Ok(())
    }

    /// Convert a sequence of mappings once; the same as `rhai.freeze`.
    #[staticmethod]
    fn freeze(records: &Bound<'_, PyAny>) -> PyResult<Frozen> {
        frozen::freeze(records)
    }
}
