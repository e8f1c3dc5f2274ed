//! The Python class Script: a compiled source and the calls of its functions.

use crate::budget::{self, Running, Stop};
use crate::compile;
use crate::config::Config;
use crate::convert;
use crate::errors::{self, Failure, Place};
use crate::sandbox::{self, Host};
use crate::stack::with_stack;
use crate::trace;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use rhai::{CallFnOptions, Dynamic, Engine, EvalAltResult, Scope, AST};
use std::collections::BTreeSet;

/// A compiled script; any number of threads may call it at once.
#[pyclass(frozen, module = "rhai")]
pub struct Script {
    name: Option<String>,
    config: Config,
    host: Host,
    engine: Engine,
    ast: AST,
    properties: BTreeSet<String>,
    functions: Vec<Function>,
}

/// A function that a script defines.
#[pyclass(frozen, get_all, eq, hash, module = "rhai")]
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Function {
    name: String,
    params: Vec<String>,
    line: usize,
}

#[pymethods]
impl Function {
    fn __repr__(&self) -> String {
        format!("<rhai.Function {} at line {}>", self.signature(), self.line)
    }
}

impl Function {
    fn signature(&self) -> String {
        format!("{}({})", self.name, self.params.join(", "))
    }
}

#[pymethods]
impl Script {
    /// Call a function of the script without holding the GIL.
    #[pyo3(signature = (name, *args))]
    fn call(&self, py: Python<'_>, name: &str, args: &Bound<'_, PyTuple>) -> PyResult<Py<PyAny>> {
        self.call_on(py, &self.engine, name, args)
    }

    /// Call a function and also give the lines that ran, in order, without repeats in a row.
    #[pyo3(signature = (name, *args))]
    fn trace(
        &self,
        py: Python<'_>,
        name: &str,
        args: &Bound<'_, PyTuple>,
    ) -> PyResult<(Py<PyAny>, Vec<usize>)> {
        // An engine of its own holds the debugger, so that the one for calls runs without.
        let mut engine =
            sandbox::engine(&self.config, &self.host, self.properties.iter().map(String::as_str));
        let lines = trace::record_lines(&mut engine);
        match self.call_on(py, &engine, name, args) {
            Ok(result) => Ok((result, lines.take())),
            Err(error) => Err(errors::with_attribute(py, error, "trace", lines.take())),
        }
    }

    /// The functions that the script itself defines, in the order of their lines.
    fn functions(&self) -> Vec<Function> {
        self.functions.clone()
    }

    #[getter]
    fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    fn __repr__(&self) -> String {
        let name = self.name.as_deref().unwrap_or("script");
        format!("<rhai.Script {name:?} with {} functions>", self.functions.len())
    }
}

impl Script {
    /// `ast` holds the prelude too; `functions` are the script's own.
    pub fn new(config: Config, host: Host, ast: AST, functions: Vec<Function>, name: Option<String>) -> Self {
        let properties = compile::property_names(&ast);
        let engine = sandbox::engine(&config, &host, properties.iter().map(String::as_str));
        Self { name, config, host, engine, ast, properties, functions }
    }

    fn call_on(
        &self,
        py: Python<'_>,
        engine: &Engine,
        name: &str,
        args: &Bound<'_, PyTuple>,
    ) -> PyResult<Py<PyAny>> {
        self.require(py, name, args.len())?;
        let args = convert::arguments(engine, args)?;
        match py.detach(|| self.run(engine, name, args)) {
            Ok(value) => convert::to_python(py, &value),
            Err(failure) => Err(errors::from_failure(py, failure, &self.entry(name))),
        }
    }

    fn run(&self, engine: &Engine, name: &str, args: Vec<Dynamic>) -> Result<Dynamic, Failure> {
        let (allowance, stack_bytes) = self.config.allowance();
        let work = || {
            let running = Running::start(allowance);
            let options = CallFnOptions::new().eval_ast(true).rewind_scope(true);
            let result = engine.call_fn_with_options(options, &mut Scope::new(), &self.ast, name, args);
            finish(result, running.stopped())
        };
        with_stack(stack_bytes, work).unwrap_or_else(|message| Err(Failure::Panic(message)))
    }

    fn require(&self, py: Python<'_>, name: &str, arguments: usize) -> PyResult<()> {
        if self.ast.shared_lib().get_script_fn(name, arguments).is_some() {
            return Ok(());
        }
        let plural = if arguments == 1 { "" } else { "s" };
        let signature = format!("{name} with {arguments} argument{plural}");
        let known: Vec<String> = self.functions.iter().map(Function::signature).collect();
        let has = if known.is_empty() { "no functions".to_owned() } else { known.join(", ") };
        let message = format!("the script has no function {signature}; it defines {has}");
        Err(errors::missing_function(py, &signature, &message, &Place::in_source(self.name.as_deref())))
    }

    /// Where a function that Python calls stands.
    fn entry(&self, name: &str) -> Place {
        let line = self.functions.iter().find(|function| function.name == name).map(|function| function.line);
        Place { source_name: self.name.clone(), function: Some(name.to_owned()), line, column: None }
    }
}

/// Decide how a run ended, on the script's thread.
fn finish(result: Result<Dynamic, Box<EvalAltResult>>, stopped: Option<Stop>) -> Result<Dynamic, Failure> {
    if let Some(stop) = stopped {
        return Err(Failure::Stopped(stop, budget::take_host_error()));
    }
    let value = result.map_err(Failure::Rhai)?.flatten();
    match convert::unportable(&value) {
        Some(type_name) => Err(Failure::Result(type_name)),
        None => Ok(value),
    }
}

/// The named functions of a source.
pub fn functions(ast: &AST) -> Vec<Function> {
    let mut found: Vec<Function> = ast
        .iter_fn_def()
        .filter(|function| rhai::is_valid_identifier(&function.name))
        .map(|function| Function {
            name: function.name.to_string(),
            params: function.params.iter().map(ToString::to_string).collect(),
            line: function.body.start_position().line().unwrap_or(0),
        })
        .collect();
    found.sort_by_key(|function| function.line);
    found
}
