"""An error says what, where, and in which function."""

from __future__ import annotations

import pickle

import pytest

import rhai


def failing(source: str, function: str = "main", *args: object, **options: object) -> rhai.Error:
    engine = rhai.Engine(timeout_s=30, prelude='fn least_loaded() {\n\n  this.min_by("load")\n}')
    with pytest.raises(rhai.Error) as raised:
        engine.compile(source, name="route.rhai").call(function, *args)
    return raised.value


@pytest.mark.parametrize(
    ("source", "kind", "line", "column", "text"),
    [
        ("fn main() {\n  let x = ;\n}", rhai.ParseError, 2, 11, "';'"),
        ("fn main() {\n  nope\n}", rhai.ParseError, 2, 3, "Undefined variable: nope"),
        ('fn main() {\n  import "x" as y;\n}', rhai.ParseError, 2, 3, "import"),
        ('fn main() {\n  print("x");\n}', rhai.ParseError, 2, 3, "print"),
        ("fn main() {\n  1 / 0\n}", rhai.ScriptRuntimeError, 2, 5, "Division by zero"),
        ("fn main() {\n  let x = 1;\n  x.nope(2)\n}", rhai.MissingFunctionError, 3, 5, "nope (i64, i64)"),
        ("fn main() {\n  [1].map(|x|\n    x.nope())\n}", rhai.MissingFunctionError, 3, 7, "nope (i64)"),
        (
            "fn main() { inner() }\nfn inner() {\n  throw `oh ${1 + 1}`;\n}",
            rhai.ScriptRuntimeError,
            3,
            3,
            "oh 2",
        ),
    ],
)
def test_place_of_an_error(source: str, kind: type[rhai.Error], line: int, column: int, text: str) -> None:
    error = failing(source)

    assert type(error) is kind
    assert (error.source_name, error.line, error.column) == ("route.rhai", line, column)
    assert text in error.message
    assert str(error) == f"route.rhai:{line}:{column}: {error.message}"


def test_innermost_function_is_named() -> None:
    assert failing("fn main() { inner() }\nfn inner() { throw 1 }").function == "inner"


def test_failure_in_the_prelude_is_shown_where_the_script_called_it() -> None:
    error = failing("fn main() {\n  let a = [#{ id: 1 }];\n  a.least_loaded()\n}")

    assert (error.source_name, error.line, error.function) == ("route.rhai", 3, "least_loaded")
    assert "no property 'load'" in error.message


def test_fault_in_the_prelude_itself_is_called_prelude() -> None:
    with pytest.raises(rhai.ParseError) as raised:
        rhai.Engine(prelude="fn good() { 1 }\nfn bad( {")

    assert (raised.value.source_name, raised.value.line) == ("prelude", 2)


def test_thrown_value_is_kept() -> None:
    error = failing('fn main() { throw #{ code: 7, why: ["a"] }; }')

    assert isinstance(error, rhai.ScriptRuntimeError)
    assert error.thrown == {"code": 7, "why": ["a"]}


def test_missing_entry_names_what_there_is() -> None:
    error = failing("fn route(task, workers) { }\nfn admit(task) { }", "route", 1)

    assert isinstance(error, rhai.MissingFunctionError)
    assert error.signature == "route with 1 argument"
    assert "route(task, workers), admit(task)" in error.message


def test_limit_error_of_a_run_has_the_line_of_the_entry() -> None:
    error = failing("// first line\nfn main() {\n  loop { }\n}")

    assert isinstance(error, rhai.LimitError)
    assert (error.limit, error.line, error.function) == ("operations", 2, "main")


def test_long_message_is_shortened() -> None:
    assert len(failing('fn main() { let s = "a"; for i in 0..15 { s += s; } throw s }').message) < 1100


def test_closure_variable_clash_says_what_to_do() -> None:
    error = failing("fn main(w) { w.filter(|x| w.some(|y| y.n > x.n)) }", "main", rhai.freeze([{"n": 1}, {"n": 2}]))

    assert "use a copy in the closure" in error.message


def test_every_error_is_a_rhai_error() -> None:
    kinds = [rhai.ParseError, rhai.ScriptRuntimeError, rhai.MissingFunctionError, rhai.LimitError]
    kinds += [rhai.ConversionError, rhai.IntegerRangeError, rhai.InternalError]

    assert all(issubclass(kind, rhai.Error) for kind in kinds)


def test_error_survives_pickling() -> None:
    error = failing("fn main() {\n  throw 5 }")

    again = pickle.loads(pickle.dumps(error))

    assert isinstance(again, rhai.ScriptRuntimeError)
    assert (again.line, again.thrown, str(again)) == (2, 5, str(error))
