//! String functions that Rhai bounds only after the fact.

use rhai::plugin::*;
use rhai::{EvalAltResult, ImmutableString, Module, NativeCallContext, Position, Shared};
use std::sync::OnceLock;

type Fallible = Result<(), Box<EvalAltResult>>;

/// `replace` of a short pattern by a long text multiplies the two lengths before Rhai measures the result.
pub fn module() -> Shared<Module> {
    static MODULE: OnceLock<Shared<Module>> = OnceLock::new();
    let make = || {
        let mut module = exported_module!(bounded);
        module.build_index();
        module.into()
    };
    MODULE.get_or_init(make).clone()
}

#[export_module]
mod bounded {
    #[rhai_fn(name = "replace", return_raw)]
    pub fn replace(ctx: NativeCallContext, text: &mut ImmutableString, find: &str, with: &str) -> Fallible {
        let kept = text.len().saturating_sub(text.matches(find).count().saturating_mul(find.len()));
        let added = text.matches(find).count().saturating_mul(with.len());
        let most = ctx.engine().max_string_size();
        if most > 0 && kept.saturating_add(added) > most {
            return Err(EvalAltResult::ErrorDataTooLarge("Length of string".into(), Position::NONE).into());
        }
        *text = text.replace(find, with).into();
        Ok(())
    }
    #[rhai_fn(name = "replace", return_raw)]
    pub fn replace_with_char(
        ctx: NativeCallContext,
        text: &mut ImmutableString,
        find: &str,
        with: char,
    ) -> Fallible {
        replace(ctx, text, find, with.encode_utf8(&mut [0; 4]))
    }
    #[rhai_fn(name = "replace", return_raw)]
    pub fn replace_char(
        ctx: NativeCallContext,
        text: &mut ImmutableString,
        find: char,
        with: &str,
    ) -> Fallible {
        replace(ctx, text, find.encode_utf8(&mut [0; 4]), with)
    }
    #[rhai_fn(name = "replace", return_raw)]
    pub fn replace_char_with_char(
        ctx: NativeCallContext,
        text: &mut ImmutableString,
        find: char,
        with: char,
    ) -> Fallible {
        replace(ctx, text, find.encode_utf8(&mut [0; 4]), with.encode_utf8(&mut [0; 4]))
    }
}
