//! Scripts that could nest closures in closures without end, or tie them in a knot.
//!
//! A closure holds the variables that it captures, and Rhai's size limits do not look into it. So
//! `loop { let g = f; f = || g; }` builds a value as deep as the script has operations, and dropping it recurses once a
//! level until the stack is gone; `a.f = || a` is never freed. Neither can happen where closures are never values that
//! a script can keep: so a script that captures must give every closure directly to a function that calls it and lets
//! go of it. A script that captures nothing may do with closures what it likes.

use rhai::{ASTNode, Array, Dynamic, Expr, FnCallExpr, Map, Position, Stmt, AST};

/// Native functions that call a closure and keep nothing of it, as long as no script function has the name.
const LETTING_GO: [&str; 16] = [
    "all", "dedup", "drain", "filter", "find", "find_map", "for_each", "index_of", "map", "order",
    "order_by", "reduce", "retain", "some", "sort", "sort_by",
];

/// What Rhai's parser calls the capturing of variables. Scripts cannot write it: the symbol is disabled.
const CAPTURE: &str = "curry";

/// Makes a pointer to a named function.
const POINTER: &str = "Fn";

/// Where a script that captures variables keeps a closure, if it does.
pub fn first_kept(ast: &AST) -> Option<Position> {
    let mut captures = false;
    let mut kept = None;
    ast.walk(&mut |path: &[ASTNode]| {
        if let Some(node) = path.last() {
            captures |= called(node).is_some_and(|call| call.name == CAPTURE);
            if kept.is_none() && makes_closure(node) && !is_let_go(ast, path) {
                kept = Some(node.position());
            }
        }
        true
    });
    kept.filter(|_| captures)
}

fn called<'a>(node: &ASTNode<'a>) -> Option<&'a FnCallExpr> {
    match node {
        ASTNode::Expr(Expr::FnCall(call, _)) | ASTNode::Stmt(Stmt::FnCall(call, _)) => Some(call),
        _ => None,
    }
}

fn makes_closure(node: &ASTNode) -> bool {
    match node {
        ASTNode::Expr(Expr::DynamicConstant(value, _)) => holds_closure(value),
        _ => called(node).is_some_and(|call| call.name == CAPTURE || call.name == POINTER),
    }
}

/// Constants of arrays and maps are folded when a script is compiled.
fn holds_closure(value: &Dynamic) -> bool {
    value.is_fnptr()
        || value.read_lock::<Array>().is_some_and(|array| array.iter().any(holds_closure))
        || value.read_lock::<Map>().is_some_and(|map| map.values().any(holds_closure))
}

/// Is the nearest node above a closure, past the block that the parser wraps it in, one that lets go of it?
fn is_let_go(ast: &AST, path: &[ASTNode]) -> bool {
    let wraps = |node: &ASTNode| matches!(node, ASTNode::Expr(Expr::Stmt(_)) | ASTNode::Stmt(Stmt::Expr(_)));
    let above = &path[..path.len() - 1];
    let Some(nearest) = above.iter().rposition(|node| !wraps(node)) else {
        return false;
    };
    match (&path[nearest], &path[nearest + 1]) {
        (ASTNode::Expr(Expr::MethodCall(call, _)), ASTNode::Expr(argument)) => lets_go(ast, call, argument),
        // The function inside the expression that captures for it.
        (node, _) => called(node).is_some_and(|call| call.name == CAPTURE),
    }
}

fn lets_go(ast: &AST, call: &FnCallExpr, argument: &Expr) -> bool {
    // A second argument may be what `reduce` starts from, and comes back as its result.
    LETTING_GO.contains(&call.name.as_str())
        && call.args.first().is_some_and(|first| std::ptr::eq(first, argument))
        && !ast.iter_functions().any(|function| function.name == call.name.as_str())
}
