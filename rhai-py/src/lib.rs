//! Python binding of the Rhai scripting language.
//!
//! The path of a call: `script.rs` converts the arguments (`convert.rs`), starts a budget (`budget.rs`), runs the
//! function without the GIL, and converts the result or the error (`errors.rs`) back.
//! The path of a compilation: `compile.rs` parses the source on a stack that is large enough, `closures.rs` refuses what
//! no limit could bound, `sandbox.rs` builds the Rhai engine that runs it.

mod budget;
mod callback;
mod closures;
mod compile;
mod config;
mod convert;
mod engine;
mod errors;
mod frozen;
mod invoke;
mod list;
mod memory;
mod record;
mod sandbox;
mod script;
mod stack;
mod text;
mod trace;

use pyo3::prelude::*;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    errors::silence_panic_output();
    module.add_class::<engine::Engine>()?;
    module.add_class::<script::Script>()?;
    module.add_class::<script::Function>()?;
    module.add_class::<frozen::Frozen>()?;
    module.add_class::<frozen::PyRecord>()?;
    module.add_function(wrap_pyfunction!(frozen::freeze, module)?)
}
