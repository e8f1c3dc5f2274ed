"""Each limit of the Engine stops a script, names itself, and lets through what stays below."""

from __future__ import annotations

from typing import Any

import pytest

import rhai

FOREVER: dict[str, Any] = {"timeout_s": 600.0, "max_operations": 2**62}


def limit_of(source: str, *args: object, **options: Any) -> str:
    with pytest.raises(rhai.LimitError) as raised:
        rhai.Engine(**options).compile(source).call("main", *args)
    return raised.value.limit


@pytest.mark.parametrize(
    ("limit", "options", "source"),
    [
        ("operations", {"max_operations": 1000}, "fn main() { loop { } }"),
        ("time", {"timeout_s": 0.001, "max_operations": 2**62}, "fn main() { loop { } }"),
        (
            "calls",
            {"max_call_levels": 5},
            "fn f(n) { if n == 0 { 0 } else { f(n - 1) } } fn main() { f(20) }",
        ),
        ("depth", {"max_expr_depth": (64, 5)}, "fn main() { ((((((((1)))))))) + 1 * (2 + (3 * (4 + 5))) }"),
        ("variables", {"max_variables": 3}, "fn main() { let a = 1; let b = 1; let c = 1; let d = 1; }"),
        ("functions", {"max_functions": 2}, "fn a() { } fn b() { } fn main() { }"),
        ("string", {"max_string_bytes": 10}, 'fn main() { let s = "12345"; s += s; s += s; s }'),
        ("array", {"max_array_items": 10}, "fn main() { let a = [1, 2, 3]; for i in 0..3 { a += a; } a }"),
        ("map", {"max_map_items": 2}, "fn main() { let m = #{}; m.a = 1; m.b = 1; m.c = 1; m }"),
        (
            "memory",
            {"max_memory_bytes": 2**20, "max_operations": 2**62},
            "fn main() { let m = #{}; let i = 0; loop { m[`${i}`] = i; i += 1; } }",
        ),
        ("source", {"max_source_bytes": 20}, "fn main() { 1 + 1 + 1 + 1 }"),
        ("source", {}, "\n" * 50_000 + "fn main() { }"),
    ],
)
def test_limit_is_named(limit: str, options: dict[str, Any], source: str) -> None:
    assert limit_of(source, **{"timeout_s": 600.0, **options}) == limit


@pytest.mark.parametrize(
    "body",
    [
        "w.filter(|x| { loop { } })",
        "w.map(|x| { loop { } })",
        "w.sort(|x, y| { loop { } })",
        "w.reduce(|x, y| { loop { } }, 0)",
        "[3, 2, 1].sort(|x, y| { loop { } }); 1",
        "[1, 1].dedup(|x, y| { loop { } }); 1",
        "for i in 0..100000 { w.some(|x| false); }",
    ],
)
def test_closures_count_towards_the_operations(body: str) -> None:
    workers = rhai.freeze([{"n": n} for n in range(20)])

    assert limit_of(f"fn main(w) {{ {body} }}", workers, timeout_s=600.0) == "operations"


def test_deadline_stops_a_loop_inside_a_closure() -> None:
    options = {**FOREVER, "timeout_s": 0.01}

    assert limit_of("fn main(w) { w.filter(|x| { loop { } }) }", rhai.freeze([{"n": 1}]), **options) == "time"


def test_limits_cannot_be_caught_by_the_script() -> None:
    assert limit_of("fn main() { try { loop { } } catch { } 1 }", timeout_s=600.0) == "operations"


def test_script_below_its_limits_runs() -> None:
    engine = rhai.Engine(max_operations=100_000, timeout_s=600.0)
    script = engine.compile("fn f(n) { if n == 0 { 0 } else { 1 + f(n - 1) } } fn main() { f(10) }")

    assert script.call("main") == 10


def test_each_call_has_its_own_budget() -> None:
    script = rhai.Engine(max_operations=1000, timeout_s=600.0).compile("fn main() { for i in 0..50 { i + 1; } 7 }")

    assert [script.call("main") for _ in range(100)] == [7] * 100


def test_deepest_settings_stay_within_the_stack() -> None:
    engine = rhai.Engine(max_call_levels=256, max_expr_depth=(128, 128), **FOREVER)
    nested = "(" * 60 + "f(n + 1)" + ")" * 60
    script = engine.compile(f"fn f(n) {{ let x = [1]; x.map(|i| i); 1 + {nested} }} fn main() {{ f(0) }}")

    with pytest.raises(rhai.LimitError) as raised:
        script.call("main")

    assert raised.value.limit in {"calls", "stack"}


@pytest.mark.parametrize(
    "options",
    [
        {"max_operations": 0},
        {"max_call_levels": 0},
        {"max_call_levels": 100_000},
        {"max_expr_depth": (0, 1)},
        {"max_expr_depth": (32, 100_000)},
        {"max_string_bytes": 0},
        {"max_array_items": 10**9},
        {"timeout_s": 0.0},
        {"timeout_s": float("nan")},
        {"timeout_s": float("inf")},
    ],
    ids=str,
)
def test_limit_that_would_mean_no_limit_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        rhai.Engine(**options)
