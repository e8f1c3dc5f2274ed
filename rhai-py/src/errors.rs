//! Rhai's errors as the Python exceptions of `rhai.errors`.

use crate::budget::Stop;
use crate::convert;
use crate::record::Record;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyType};
use rhai::{EvalAltResult, LexError, ParseError, ParseErrorType, Position};

/// The source name that errors in a prelude carry.
pub const PRELUDE: &str = "prelude";

/// Lines put before a prelude, so that a position tells whose source it is in.
pub const LINES_BEFORE_PRELUDE: usize = 40_000;

/// A message may quote what the script threw, which may be long.
const MAX_MESSAGE_CHARS: usize = 1000;

/// Where an error is, as far as it is known.
#[derive(Clone, Default)]
pub struct Place {
    pub source_name: Option<String>,
    pub function: Option<String>,
    pub line: Option<usize>,
    pub column: Option<usize>,
}

impl Place {
    pub fn in_source(source_name: Option<&str>) -> Self {
        Self { source_name: source_name.map(str::to_owned), ..Self::default() }
    }

    fn at(mut self, position: Position) -> Self {
        self.column = position.position();
        self.line = position.line();
        if is_in_prelude(position) {
            self.line = position.line().map(|line| line - LINES_BEFORE_PRELUDE);
            self.source_name = Some(PRELUDE.to_owned());
        }
        self
    }
}

pub fn is_in_prelude(position: Position) -> bool {
    position.line().is_some_and(|line| line > LINES_BEFORE_PRELUDE)
}

/// How a run that gave no value ended. It is made on the script's thread and turned into an exception on Python's.
pub enum Failure {
    Rhai(Box<EvalAltResult>),
    /// A budget stopped the script; the exception is that of a Python callable.
    Stopped(Stop, Option<PyErr>),
    /// The result is of a type that Python cannot hold.
    Result(String),
    Panic(String),
}

pub fn conversion_error(py: Python<'_>, message: &str) -> PyErr {
    build(py, "ConversionError", message, &Place::default())
}

pub fn integer_range_error(py: Python<'_>, message: &str) -> PyErr {
    build(py, "IntegerRangeError", message, &Place::default())
}

pub fn internal_error(py: Python<'_>, message: &str, place: &Place) -> PyErr {
    build(py, "InternalError", message, place)
}

pub fn limit_error(py: Python<'_>, limit: &str, message: &str, place: &Place) -> PyErr {
    with_attribute(py, build(py, "LimitError", message, place), "limit", limit)
}

pub fn missing_function(py: Python<'_>, signature: &str, message: &str, place: &Place) -> PyErr {
    with_attribute(py, build(py, "MissingFunctionError", message, place), "signature", signature)
}

pub fn from_parse(py: Python<'_>, error: &ParseError, source_name: Option<&str>) -> PyErr {
    let place = Place::in_source(source_name).at(error.position());
    parse_kind(py, error.err_type(), &place)
}

/// A closure is a value in a script that captures variables.
pub fn kept_closure(py: Python<'_>, position: Position, source_name: Option<&str>) -> PyErr {
    let message = "this script uses variables from outside a closure, so each closure must be written directly as the \
                   argument of filter, map, some, all, find, sort, reduce or the like; it cannot be kept or passed on";
    build(py, "ParseError", message, &Place::in_source(source_name).at(position))
}

/// Convert how a run failed. `entry` is the function that Python called, with the line it starts at.
pub fn from_failure(py: Python<'_>, failure: Failure, entry: &Place) -> PyErr {
    match failure {
        Failure::Rhai(error) => {
            let (error, place) = innermost(*error, entry);
            run_kind(py, error, &place)
        }
        Failure::Stopped(Stop::Host, cause) => {
            let what = cause.as_ref().map_or_else(String::new, |error| format!(": {error}"));
            let raised = build(py, "ScriptRuntimeError", &format!("a Python callable failed{what}"), entry);
            raised.set_cause(py, cause);
            raised
        }
        Failure::Stopped(stop, _) => limit_error(py, stop.name(), stop_message(stop), entry),
        Failure::Result(type_name) => {
            let message = format!("the script returned a {type_name}, which has no Python form");
            build(py, "ConversionError", &message, entry)
        }
        Failure::Panic(message) => internal_error(py, &message, entry),
    }
}

/// Unwrap the calls around an error. The place is the innermost one in the user's own source: what fails inside the
/// prelude is shown where the script called it. Rhai keeps no position for limits; then it is that of the entry.
fn innermost(mut error: EvalAltResult, entry: &Place) -> (EvalAltResult, Place) {
    let mut place = entry.clone();
    let mut position = Position::NONE;
    loop {
        let here = error.position();
        if !here.is_none() && (position.is_none() || !is_in_prelude(here)) {
            position = here;
        }
        match error {
            EvalAltResult::ErrorInFunctionCall(name, _, inner, _) => {
                if rhai::is_valid_identifier(&name) {
                    place.function = Some(name);
                }
                error = *inner;
            }
            EvalAltResult::ErrorInModule(_, inner, _) => error = *inner,
            _ => break,
        }
    }
    if !position.is_none() {
        place = place.at(position);
    }
    error.clear_position();
    (error, place)
}

fn run_kind(py: Python<'_>, error: EvalAltResult, place: &Place) -> PyErr {
    use EvalAltResult as E;
    match &error {
        E::ErrorParsing(kind, _) => parse_kind(py, kind, place),
        E::ErrorTooManyVariables(_) => limit_error(py, "variables", "too many variables at once", place),
        E::ErrorTooManyModules(_) => limit_error(py, "modules", "modules are switched off", place),
        E::ErrorStackOverflow(_) => limit_error(py, "calls", "function calls nest too deeply", place),
        E::ErrorDataTooLarge(what, _) => {
            limit_error(py, size_limit(what), &format!("{what} is over the limit"), place)
        }
        E::ErrorFunctionNotFound(signature, _) => {
            missing_function(py, signature, &format!("no function {signature}"), place)
        }
        E::ErrorPropertyNotFound(message, _) if message.starts_with(Record::MISSING) => {
            build(py, "ScriptRuntimeError", message, place)
        }
        E::ErrorDataRace(..) => {
            let message = format!(
                "{error}: a closure uses the variable whose method runs it; use a copy in the closure"
            );
            build(py, "ScriptRuntimeError", &message, place)
        }
        E::ErrorRuntime(thrown, _) => {
            let message =
                if thrown.is_unit() { "thrown by the script".to_owned() } else { thrown.to_string() };
            let raised = build(py, "ScriptRuntimeError", &message, place);
            let value = convert::to_python(py, thrown).unwrap_or_else(|_| py.None());
            with_attribute(py, raised, "thrown", value)
        }
        _ => build(py, "ScriptRuntimeError", &error.to_string(), place),
    }
}

fn stop_message(stop: Stop) -> &'static str {
    match stop {
        Stop::Operations => "the script runs too many operations",
        Stop::Time => "the script takes too long",
        Stop::Memory => "the script holds too much memory",
        Stop::Stack | Stop::Host => "the script nests too deeply for this thread's stack",
    }
}

fn parse_kind(py: Python<'_>, kind: &ParseErrorType, place: &Place) -> PyErr {
    use ParseErrorType as P;
    let message = kind.to_string();
    match kind {
        P::ExprTooDeep => limit_error(py, "depth", "the expression or block nests too deeply", place),
        P::TooManyFunctions => limit_error(py, "functions", &message, place),
        P::LiteralTooLarge(what, _) => limit_error(py, size_limit(what), &message, place),
        P::BadInput(LexError::StringTooLong(_)) => limit_error(py, "string", &message, place),
        _ => build(py, "ParseError", &message, place),
    }
}

fn size_limit(what: &str) -> &'static str {
    let what = what.to_ascii_lowercase();
    if what.contains("string") {
        "string"
    } else if what.contains("map") {
        "map"
    } else {
        "array"
    }
}

fn build(py: Python<'_>, class: &str, message: &str, place: &Place) -> PyErr {
    try_build(py, class, message, place).unwrap_or_else(|failure| failure)
}

fn try_build(py: Python<'_>, class: &str, message: &str, place: &Place) -> PyResult<PyErr> {
    let class = py.import("rhai.errors")?.getattr(class)?.cast_into::<PyType>()?;
    let details = PyDict::new(py);
    details.set_item("line", place.line)?;
    details.set_item("column", place.column)?;
    details.set_item("source_name", place.source_name.as_deref())?;
    details.set_item("function", place.function.as_deref())?;
    Ok(PyErr::from_value(class.call((shortened(message),), Some(&details))?))
}

fn shortened(message: &str) -> String {
    match message.char_indices().nth(MAX_MESSAGE_CHARS) {
        Some((end, _)) => format!("{}…", &message[..end]),
        None => message.to_owned(),
    }
}

pub fn with_attribute<'py>(
    py: Python<'py>,
    error: PyErr,
    name: &str,
    value: impl IntoPyObject<'py>,
) -> PyErr {
    match error.value(py).setattr(name, value) {
        Ok(()) => error,
        Err(failure) => failure,
    }
}

/// Keep Rust's panic message off stderr: it reaches Python in `InternalError`. The hook is that of this extension's
/// own copy of the standard library and touches no other Rust code in the process.
pub fn silence_panic_output() {
    std::panic::set_hook(Box::new(|_| {}));
}

/// What a caught panic said.
pub fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied());
    format!("Rhai panicked: {}", text.unwrap_or("no message"))
}
