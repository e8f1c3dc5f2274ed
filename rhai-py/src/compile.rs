//! From source text to a syntax tree.

use crate::closures;
use crate::config::Config;
use crate::errors::{self, Place, LINES_BEFORE_PRELUDE};
use crate::stack::with_stack;
use pyo3::prelude::*;
use rhai::{ASTNode, Engine, Expr, AST};
use std::collections::BTreeSet;

/// Rhai's parser and optimizer recurse with the source; this covers the deepest one that the limits let through.
const PARSER_STACK_BYTES: usize = 4 * 1024 * 1024;

/// Parse a script.
///
/// Raises ParseError or LimitError; never lets the parser near the end of the stack.
pub fn parse(
    py: Python<'_>,
    engine: &Engine,
    config: &Config,
    source: &str,
    name: Option<&str>,
) -> PyResult<AST> {
    let place = Place::in_source(name);
    if source.len() > config.max_source_bytes {
        let message =
            format!("the source has {} bytes, the limit is {}", source.len(), config.max_source_bytes);
        return Err(errors::limit_error(py, "source", &message, &place));
    }
    if source.lines().nth(LINES_BEFORE_PRELUDE).is_some() {
        let message = format!("the source has more than {LINES_BEFORE_PRELUDE} lines");
        return Err(errors::limit_error(py, "source", &message, &place));
    }
    parse_unchecked(py, engine, source, name)
}

/// Parse a prelude, on lines that no script has.
pub fn parse_prelude(py: Python<'_>, engine: &Engine, source: &str) -> PyResult<AST> {
    parse_unchecked(py, engine, &("\n".repeat(LINES_BEFORE_PRELUDE) + source), Some(errors::PRELUDE))
}

fn parse_unchecked(py: Python<'_>, engine: &Engine, source: &str, name: Option<&str>) -> PyResult<AST> {
    match py.detach(|| with_stack(PARSER_STACK_BYTES, || engine.compile(source))) {
        Ok(Ok(ast)) => Ok(ast),
        Ok(Err(error)) => Err(errors::from_parse(py, &error, name)),
        Err(message) => Err(errors::internal_error(py, &message, &Place::in_source(name))),
    }
}

/// Put a script over the prelude; a function of the script replaces one of the same name and parameters.
///
/// Raises ParseError for closures that could nest without end.
pub fn merge(py: Python<'_>, prelude: &AST, ast: &AST, name: Option<&str>) -> PyResult<AST> {
    let merged = prelude.merge(ast);
    match closures::first_kept(&merged) {
        Some(position) => Err(errors::kept_closure(py, position, name)),
        None => Ok(merged),
    }
}

/// The names of all properties that a script reads or writes.
pub fn property_names(ast: &AST) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    ast.walk(&mut |path: &[ASTNode]| {
        if let Some(ASTNode::Expr(Expr::Property(property, _))) = path.last() {
            names.insert(property.2.to_string());
        }
        true
    });
    names
}
