//! The Rhai engine that scripts are compiled and run with: what is in it, and what is not.

use crate::budget;
use crate::callback::{self, Callback};
use crate::config::Config;
use crate::list;
use crate::record::Record;
use crate::text;
use pyo3::{Py, PyAny};
use rhai::packages::{
    ArithmeticPackage, BasicArrayPackage, BasicFnPackage, BasicIteratorPackage, BasicMapPackage,
    BasicMathPackage, BasicStringPackage, BitFieldPackage, LogicPackage, MoreStringPackage, Package,
};
use rhai::{Dynamic, Engine, Shared};
use std::sync::Arc;

/// What the host adds to every script.
#[derive(Clone, Default)]
pub struct Host {
    pub callbacks: Vec<Arc<Callback>>,
    pub print: Option<Arc<Py<PyAny>>>,
    pub debug: Option<Arc<Py<PyAny>>>,
}

/// Build an engine. `properties` are the property names that the script reads: each gets its own getter on records,
/// since a property without one is looked for, fails with a formatted error, and only then goes to the indexer.
pub fn engine<'a>(config: &Config, host: &Host, properties: impl IntoIterator<Item = &'a str>) -> Engine {
    let mut engine = Engine::new_raw();
    add_packages(&mut engine);
    set_limits(&mut engine, config);
    let strict = config.strict_variables;
    engine.register_global_module(text::module());
    engine.register_global_module(list::module());
    engine.register_indexer_get(move |record: &mut Record, name: &str| record.property(name, strict));
    for name in properties {
        let property = name.to_owned();
        engine.register_get(name, move |record: &mut Record| record.property(&property, strict));
    }
    for callback in &host.callbacks {
        callback.register(&mut engine);
    }
    set_output(&mut engine, host);
    engine.on_progress(budget::charge);
    engine
}

/// Everything but `LanguageCorePackage` (sleep, exit, parse_json, the function list), time and BLOBs.
fn add_packages(engine: &mut Engine) {
    for package in [
        ArithmeticPackage::new().as_shared_module(),
        BasicStringPackage::new().as_shared_module(),
        BasicIteratorPackage::new().as_shared_module(),
        BasicFnPackage::new().as_shared_module(),
        LogicPackage::new().as_shared_module(),
        BitFieldPackage::new().as_shared_module(),
        BasicMathPackage::new().as_shared_module(),
        BasicArrayPackage::new().as_shared_module(),
        BasicMapPackage::new().as_shared_module(),
        MoreStringPackage::new().as_shared_module(),
    ] {
        engine.register_global_module(Shared::clone(&package));
    }
    // `curry` doubles a closure that is curried with itself, which no size limit sees; closures capture without it.
    for symbol in ["eval", "import", "export", "curry"] {
        engine.disable_symbol(symbol);
    }
}

fn set_limits(engine: &mut Engine, config: &Config) {
    let (outside, inside) = config.max_expr_depth;
    engine
        // Operations are counted by the budget, which closures cannot escape.
        .set_max_operations(0)
        .set_max_modules(0)
        .set_max_call_levels(config.max_call_levels)
        .set_max_expr_depths(outside, inside)
        .set_max_variables(config.max_variables)
        .set_max_functions(config.max_functions)
        .set_max_string_size(config.max_string_bytes)
        .set_max_array_size(config.max_array_items)
        .set_max_map_size(config.max_map_items)
        .set_strict_variables(config.strict_variables);
}

/// `print` and `debug` exist only where the host takes their text.
fn set_output(engine: &mut Engine, host: &Host) {
    match host.print.clone() {
        Some(print) => drop(engine.on_print(move |text| callback::tell(&print, &[text.into()]))),
        None => drop(engine.disable_symbol("print")),
    }
    match host.debug.clone() {
        Some(debug) => drop(engine.on_debug(move |text, _source, position| {
            let line: Dynamic = position.line().map_or(Dynamic::UNIT, |line| crate::invoke::int(line).into());
            callback::tell(&debug, &[text.into(), line]);
        })),
        None => drop(engine.disable_symbol("debug")),
    }
}
