//! Calling a script's closure many times without what Rhai pays for each call.
//!
//! `FnPtr::call_raw` clones the runtime state and starts with empty function caches at every call. Here a call goes
//! through the expression `call(f, a)`, evaluated with one runtime state and one cache for a whole `filter` or `sort`.

use rhai::{
    Caches, Dynamic, Engine, EvalAltResult, FnPtr, GlobalRuntimeState, NativeCallContext, Position, Scope,
    AST,
};
use std::sync::OnceLock;

pub type RhaiResult = Result<Dynamic, Box<EvalAltResult>>;

/// The names in the call expressions.
const POINTER: &str = "f";
const ARGUMENTS: [&str; 2] = ["a", "b"];

/// Puts the call expressions on a line that no script has, so that a trace can leave them out.
const LINES_BEFORE: usize = 65_000;

/// `call(f, a)` and `call(f, a, b)`; they belong to no engine.
fn call_expression(arguments: usize) -> &'static AST {
    static ONE: OnceLock<AST> = OnceLock::new();
    static TWO: OnceLock<AST> = OnceLock::new();
    let make = |source| Engine::new_raw().compile("\n".repeat(LINES_BEFORE) + source).unwrap_or_default();
    match arguments {
        1 => ONE.get_or_init(|| make("call(f, a)")),
        _ => TWO.get_or_init(|| make("call(f, a, b)")),
    }
}

/// A script function ready to be called again and again.
pub struct Repeated<'a> {
    engine: &'a Engine,
    pointer: &'a FnPtr,
    global: GlobalRuntimeState,
    caches: Caches,
    scope: Scope<'static>,
}

impl<'a> Repeated<'a> {
    fn new(ctx: &'a NativeCallContext<'a>, pointer: &'a FnPtr) -> Self {
        let mut caches = Caches::new();
        // Without a cache in place Rhai makes one at each evaluation and drops it after.
        caches.push_fn_resolution_cache();
        Self {
            engine: ctx.engine(),
            pointer,
            global: ctx.global_runtime_state().clone(),
            caches,
            scope: Scope::new(),
        }
    }

    fn call<const N: usize>(&mut self, args: [Dynamic; N]) -> RhaiResult {
        self.scope.push(POINTER, self.pointer.clone());
        for (name, value) in ARGUMENTS.iter().zip(args) {
            self.scope.push_dynamic(*name, value);
        }
        let expression = call_expression(N);
        #[allow(deprecated)] // the one public door to an evaluation that keeps its caches
        let result = self.engine.eval_statements_raw(
            &mut self.global,
            &mut self.caches,
            &mut self.scope,
            expression.statements(),
        );
        self.scope.clear();
        result.map_err(|mut error| {
            // The position is one in the call expression; Rhai fills in that of `filter` if there is none.
            error.clear_position();
            error
        })
    }
}

/// How many arguments, beyond curried ones, a closure takes.
pub fn takes(ctx: &NativeCallContext, pointer: &FnPtr, extra: usize) -> bool {
    let wanted = pointer.curry().len() + extra;
    let mut modules = ctx.namespaces().iter();
    modules.any(|module| module.get_script_fn(pointer.fn_name(), wanted).is_some())
}

/// A closure given to a list function.
pub enum Callable<'a> {
    /// A script function of the item.
    Item(Box<Repeated<'a>>),
    /// A script function of the item and its place.
    ItemAndIndex(Box<Repeated<'a>>),
    /// A closure without parameters: the item is `this`.
    This(&'a NativeCallContext<'a>, &'a FnPtr),
    /// Anything else, such as a pointer to a native function.
    Native(&'a NativeCallContext<'a>, &'a FnPtr),
}

impl<'a> Callable<'a> {
    pub fn new(ctx: &'a NativeCallContext<'a>, pointer: &'a FnPtr) -> Self {
        if takes(ctx, pointer, 1) {
            Self::Item(Box::new(Repeated::new(ctx, pointer)))
        } else if takes(ctx, pointer, 2) {
            Self::ItemAndIndex(Box::new(Repeated::new(ctx, pointer)))
        } else if takes(ctx, pointer, 0) {
            Self::This(ctx, pointer)
        } else {
            Self::Native(ctx, pointer)
        }
    }

    /// Call it on an item.
    pub fn call(&mut self, item: &Dynamic, index: usize) -> RhaiResult {
        match self {
            Self::Item(function) => function.call([item.clone()]),
            Self::ItemAndIndex(function) => function.call([item.clone(), int(index).into()]),
            Self::This(ctx, pointer) => pointer.call_raw(ctx, Some(&mut item.clone()), []),
            Self::Native(ctx, pointer) => pointer.call_raw(ctx, None, [item.clone()]),
        }
    }

    /// Call it on an item and read the answer as yes or no.
    pub fn test(&mut self, item: &Dynamic, index: usize) -> Result<bool, Box<EvalAltResult>> {
        let answer = self.call(item, index)?;
        answer.as_bool().map_err(|found| {
            let message = format!("the closure must return true or false, not {found}");
            EvalAltResult::ErrorRuntime(message.into(), Position::NONE).into()
        })
    }
}

/// A closure of two items, as in `sort` and `reduce`.
pub enum PairCallable<'a> {
    Script(Box<Repeated<'a>>),
    Native(&'a NativeCallContext<'a>, &'a FnPtr),
}

impl<'a> PairCallable<'a> {
    pub fn new(ctx: &'a NativeCallContext<'a>, pointer: &'a FnPtr) -> Self {
        if takes(ctx, pointer, 2) {
            Self::Script(Box::new(Repeated::new(ctx, pointer)))
        } else {
            Self::Native(ctx, pointer)
        }
    }

    pub fn call(&mut self, first: Dynamic, second: Dynamic) -> RhaiResult {
        match self {
            Self::Script(function) => function.call([first, second]),
            Self::Native(ctx, pointer) => pointer.call_raw(ctx, None, [first, second]),
        }
    }
}

/// A length or place as a Rhai integer.
pub fn int(count: usize) -> rhai::INT {
    rhai::INT::try_from(count).unwrap_or(rhai::INT::MAX)
}
