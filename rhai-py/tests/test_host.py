"""What the host adds: a prelude, Python callables, print, and the list of functions and lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import rhai


def test_callable_is_a_function_and_a_method(engine: rhai.Engine) -> None:
    engine.register("times", lambda a, b: a * b)
    script = engine.compile("fn main(n) { times(n, 2) + n.times(10) }")

    assert script.call("main", 3) == 36


def test_callable_receives_records_and_returns_one(engine: rhai.Engine) -> None:
    def pick(workers: list[rhai.Record]) -> rhai.Record:
        return max(workers, key=lambda worker: worker["n"])

    engine.register("pick", pick)
    chosen = engine.compile("fn main(w) { w.filter(|x| x.n < 3).pick() }").call(
        "main", rhai.freeze([{"n": n} for n in (1, 2, 9)])
    )

    assert chosen.index == 1


@pytest.mark.parametrize(
    ("function", "calls"),
    [(lambda a, b=5: a + b, "f(1) + f(1, 2)"), (lambda *all: sum(all) + 9 - sum(all), "f(1, 2, 3, 4)")],
)
def test_arity_follows_the_signature(engine: rhai.Engine, function: Callable[..., object], calls: str) -> None:
    engine.register("f", function)

    assert engine.compile(f"fn main() {{ {calls} }}").call("main") == 9


def test_wrong_number_of_arguments_is_a_missing_function(engine: rhai.Engine) -> None:
    engine.register("f", lambda a: a)

    with pytest.raises(rhai.MissingFunctionError, match=r"f \(i64, i64\)"):
        engine.compile("fn main() { f(1, 2) }").call("main")


@pytest.mark.parametrize(
    "body",
    ["fail()", "try { fail() } catch { 1 }", "[2, 1].sort(|a, b| fail()); 1", "w.filter(|x| fail())"],
    ids=["plain", "in try", "in an array's sort", "in filter"],
)
def test_exception_of_a_callable_ends_the_script(engine: rhai.Engine, body: str) -> None:
    cause = KeyError("gone")

    def fail() -> None:
        raise cause

    engine.register("fail", fail)
    with pytest.raises(rhai.ScriptRuntimeError, match="gone") as raised:
        engine.compile(f"fn main(w) {{ {body} }}").call("main", rhai.freeze([{"n": 1}]))

    assert raised.value.__cause__ is cause


def test_unfit_result_of_a_callable_is_the_cause(engine: rhai.Engine) -> None:
    engine.register("f", lambda: b"bytes")

    with pytest.raises(rhai.ScriptRuntimeError) as raised:
        engine.compile("fn main() { f() }").call("main")

    assert isinstance(raised.value.__cause__, rhai.ConversionError)


def test_script_called_from_a_callable_has_its_own_budget(engine: rhai.Engine) -> None:
    inner = rhai.Engine(max_operations=200, timeout_s=30).compile("fn main() { loop { } }")

    def call_inner() -> str:
        with pytest.raises(rhai.LimitError):
            inner.call("main")
        return "stopped"

    engine.register("call_inner", call_inner)

    assert engine.compile("fn main() { [call_inner(), call_inner()] }").call("main") == ["stopped", "stopped"]


def test_script_that_calls_itself_through_python_is_stopped() -> None:
    engine = rhai.Engine(timeout_s=30)
    scripts: list[rhai.Script] = []
    engine.register("again", lambda: scripts[0].call("main"))
    scripts.append(engine.compile("fn main() { again() }"))

    with pytest.raises((rhai.Error, RecursionError)):
        scripts[0].call("main")


def test_register_reaches_later_scripts_only(engine: rhai.Engine) -> None:
    before = engine.compile("fn main() { f() }")
    engine.register("f", lambda: 1)
    after = engine.compile("fn main() { f() }")
    engine.register("f", lambda: 2)

    assert after.call("main") == 1
    assert engine.compile("fn main() { f() }").call("main") == 2
    with pytest.raises(rhai.MissingFunctionError):
        before.call("main")


@pytest.mark.parametrize("name", ["", "1a", "a b", "let x", "a.b"])
def test_name_that_scripts_cannot_write_is_refused(engine: rhai.Engine, name: str) -> None:
    with pytest.raises(ValueError, match="identifier"):
        engine.register(name, lambda: 1)


def test_only_callables_are_registered(engine: rhai.Engine) -> None:
    with pytest.raises(TypeError, match="not callable"):
        engine.register("f", 5)  # type: ignore[arg-type]


def test_prelude_counts_for_nothing_and_is_not_listed() -> None:
    prelude = "".join(f"fn helper{i}() {{ {i} }}\n" for i in range(40))
    engine = rhai.Engine(prelude=prelude, max_functions=1, timeout_s=30)
    script = engine.compile("fn main() { helper39() }")

    assert [function.name for function in script.functions()] == ["main"]
    assert script.call("main") == 39


def test_script_may_replace_a_function_of_the_prelude(engine: rhai.Engine) -> None:
    script = engine.compile('fn admit() { "mine" }\nfn main() { admit() }')

    assert script.call("main") == "mine"
    assert engine.compile("fn main() { admit() }").call("main") == {"admit": True}


def test_constants_are_seen_through_global(engine: rhai.Engine) -> None:
    assert engine.compile("const MOST = 5;\nfn main(n) { n > global::MOST }").call("main", 6) is True


def test_functions_with_parameters_and_lines(engine: rhai.Engine) -> None:
    source = "// comment\nfn second(a, b) {\n}\n\nfn first() { [1].map(|x| x) }\n"
    functions = engine.compile(source).functions()

    assert [(f.name, f.params, f.line) for f in functions] == [("second", ["a", "b"], 2), ("first", [], 5)]


TRACED = """fn main(w) {
    let n = w.len();
    if n > 5 {
        return "many";
    }
    for x in w {
        if x.n == 2 {
            return x;
        }
    }
    w.least_loaded()
}"""


@pytest.mark.parametrize(
    ("numbers", "lines"),
    [
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4]),
        ([1, 2], [1, 2, 3, 6, 7, 8]),
        ([1], [1, 2, 3, 6, 7, 11]),
    ],
)
def test_trace_ends_with_the_line_that_decided(engine: rhai.Engine, numbers: list[int], lines: list[int]) -> None:
    script = engine.compile(TRACED)
    workers = rhai.freeze([{"n": n, "load": n} for n in numbers])

    result, trace = script.trace("main", workers)

    assert result == script.call("main", workers)
    assert trace == lines


def test_trace_of_a_failure_is_on_the_error(engine: rhai.Engine) -> None:
    with pytest.raises(rhai.ScriptRuntimeError) as raised:
        engine.compile("fn main() {\n  let a = 1;\n  throw a;\n}").trace("main")

    assert raised.value.trace[-1] == 3


def test_print_and_debug_go_to_the_host() -> None:
    said: list[Any] = []
    engine = rhai.Engine(print=said.append, debug=lambda text, line: said.append((text, line)), timeout_s=30)

    engine.compile('fn main() {\n  print("hello");\n  debug([1]);\n}').call("main")

    assert said == ["hello", ("[1]", 3)]


def test_failing_print_ends_the_script() -> None:
    def fail(text: str) -> None:
        raise OSError(text)

    script = rhai.Engine(print=fail, timeout_s=30).compile('fn main() { print("full"); 1 }')
    with pytest.raises(rhai.ScriptRuntimeError, match="full") as raised:
        script.call("main")

    assert isinstance(raised.value.__cause__, OSError)
