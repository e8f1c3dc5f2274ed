//! Python callables as script functions.

use crate::budget;
use crate::convert;
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};
use rhai::{Dynamic, Engine, EvalAltResult, Position};
use std::any::TypeId;
use std::sync::Arc;

/// Without a readable signature a callable is registered for every number of arguments up to this.
const MOST_ARGUMENTS: usize = 8;

/// A Python callable under the name that scripts use.
pub struct Callback {
    pub name: String,
    callable: Py<PyAny>,
    argument_counts: Vec<usize>,
}

impl Callback {
    /// Read from the signature how many arguments the callable takes.
    pub fn new(name: &str, callable: &Bound<'_, PyAny>) -> PyResult<Self> {
        let argument_counts = match required_and_most(callable) {
            Ok((required, most)) => (required..=most.max(required)).collect(),
            Err(_) => (0..=MOST_ARGUMENTS).collect(),
        };
        Ok(Self { name: name.to_owned(), callable: callable.clone().unbind(), argument_counts })
    }

    pub fn register(self: &Arc<Self>, engine: &mut Engine) {
        for count in &self.argument_counts {
            let this = self.clone();
            let any = vec![TypeId::of::<Dynamic>(); *count];
            engine.register_raw_fn(self.name.as_str(), any, move |ctx, args| {
                let args: Vec<Dynamic> = args.iter().map(|arg| arg.flatten_clone()).collect();
                run(&this.callable, &args, |answer| convert::to_rhai(ctx.engine(), answer, "the result"))
            });
        }
    }
}

/// Tell a Python callable something; what it returns is of no interest. A failure is kept in the budget and ends the
/// script at its next operation.
pub fn tell(callable: &Py<PyAny>, args: &[Dynamic]) {
    let _ended = run(callable, args, |_| Ok(()));
}

/// Call a Python callable and read its answer. An exception ends the script: `try` in the script does not catch it.
fn run<T>(
    callable: &Py<PyAny>,
    args: &[Dynamic],
    read: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<T>,
) -> Result<T, Box<EvalAltResult>> {
    let answer = budget::suspended(|| {
        Python::attach(|py| {
            let args: PyResult<Vec<_>> = args.iter().map(|arg| convert::to_python(py, arg)).collect();
            read(&callable.bind(py).call1(PyTuple::new(py, args?)?)?)
        })
    });
    answer.map_err(|error| {
        budget::stop_for_host_error(error);
        EvalAltResult::ErrorTerminated("host".into(), Position::NONE).into()
    })
}

/// The least and greatest number of positional arguments.
fn required_and_most(callable: &Bound<'_, PyAny>) -> PyResult<(usize, usize)> {
    let py = callable.py();
    let inspect = py.import("inspect")?;
    let parameters = inspect.call_method1("signature", (callable,))?.getattr("parameters")?;
    let (mut required, mut most) = (0, 0);
    for parameter in parameters.call_method0("values")?.try_iter()? {
        let parameter = parameter?;
        let kind = parameter.getattr("kind")?.getattr("name")?;
        match kind.cast::<PyString>()?.to_cow()?.as_ref() {
            "POSITIONAL_ONLY" | "POSITIONAL_OR_KEYWORD" => {
                most += 1;
                let default = parameter.getattr("default")?;
                if default.is(&inspect.getattr("Parameter")?.getattr("empty")?) {
                    required = most;
                }
            }
            "VAR_POSITIONAL" => most = most.max(MOST_ARGUMENTS),
            _ => {}
        }
    }
    Ok((required, most))
}
