"""Frozen records: converted once, read like an array of objects, and never changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest

import rhai

WORKERS: list[dict[str, Any]] = [
    {"id": "w0", "hive": "mac", "load": 0.5, "gpus": 1, "models": ["a", "b"], "limits": {"queue": 4}},
    {"id": "w1", "hive": "pc", "load": 0.25, "gpus": 2, "models": ["b"], "limits": {"queue": 2}},
    {"id": "w2", "hive": "pc", "load": None, "gpus": 1, "models": [], "limits": {"queue": 1}},
    {"id": "w3", "hive": "old", "load": 0.75, "gpus": 4, "models": ["c"], "limits": {"queue": 9}},
]


@pytest.fixture
def workers() -> rhai.Frozen:
    return rhai.freeze(WORKERS)


def ids(records: list[rhai.Record]) -> str:
    return " ".join(record["id"] for record in records)


@pytest.mark.parametrize(
    ("expression", "chosen"),
    [
        ('a.filter(|w| w.hive == "pc")', "w1 w2"),
        ('a.filter(|w| w.hive == "pc").filter(|w| w.gpus > 1)', "w1"),
        ("a.filter(|w, i| i > 2)", "w3"),
        ('a.filter(|| this.hive == "mac")', "w0"),
        ('a.filter(|w| "b" in w.models)', "w0 w1"),
        ("a.filter(|w| w.limits.queue > 3)", "w0 w3"),
        ("a.filter(|w| false)", ""),
        ('a.sort_by("load")', "w1 w0 w3 w2"),
        ('a.sort_by("gpus")', "w0 w2 w1 w3"),
        ('a.sort_by("id")', "w0 w1 w2 w3"),
        ("a.sort_by(|w| w.gpus)", "w0 w2 w1 w3"),
        ("a.sort_by(|x, y| y.gpus - x.gpus)", "w3 w1 w0 w2"),
        ("a.sort(|x, y| x.gpus > y.gpus)", "w3 w1 w2 w0"),
        ("a.extract(1, 2)", "w1 w2"),
        ("let out = []; for w in a { if w.gpus == 1 { out.push(w); } } out", "w0 w2"),
        ("a.map(|w| w)", "w0 w1 w2 w3"),
        ("a.to_array().filter(|w| w.gpus == 4)", "w3"),
    ],
)
def test_list_of_records_is_chosen(
    evaluate: Callable[..., Any], workers: rhai.Frozen, expression: str, chosen: str
) -> None:
    assert ids(evaluate(expression, workers)) == chosen


@pytest.mark.parametrize(
    ("expression", "chosen"),
    [
        ("a.first()", 0),
        ("a.last()", 3),
        ("a[1]", 1),
        ("a[-1]", 3),
        ("a.get(2)", 2),
        ('a.min_by("load")', 1),
        ('a.max_by("load")', 3),
        ("a.least_loaded()", 1),
        ("[a[0], a[3]].least_loaded()", 0),
        ("a.find(|w| w.gpus == 4)", 3),
        ('a.filter(|w| w.hive == "pc").least_loaded()', 1),
        ('a.filter(|w| w.id == "w2").random()', 2),
        ("a.filter(|w| w.load == ()).least_loaded()", 2),
        ("a.reduce(|best, w| if best == () || w.gpus > best.gpus { w } else { best })", 3),
    ],
)
def test_one_record_is_chosen(evaluate: Callable[..., Any], workers: rhai.Frozen, expression: str, chosen: int) -> None:
    record = evaluate(expression, workers)

    assert isinstance(record, rhai.Record)
    assert record.index == chosen
    assert record["id"] == WORKERS[chosen]["id"]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("a.len() + a.len", 8),
        ("a.is_empty()", False),
        ("a.some(|w| w.gpus == 4)", True),
        ("a.all(|w| w.gpus > 0)", True),
        ("a.map(|w| w.gpus)", [1, 2, 1, 4]),
        ("a.reduce(|sum, w| sum + w.gpus, 10)", 18),
        ("a.index_of(|w| w.gpus == 2)", 1),
        ("a.index_of(a[3])", 3),
        ("a[3] in a", True),
        ("a[0] == a.first()", True),
        ("a[0] != a[1]", True),
        ('"hive" in a[0]', True),
        ('"nope" in a[0]', False),
        ("a[0].limits", {"queue": 4}),
        ("a[0].models", ["a", "b"]),
        ('a[0]["id"]', "w0"),
        ("a[0].keys().len()", 6),
        ("type_of(a) + type_of(a[0])", "listrecord"),
        ('let n = 0; a.for_each(|w| { if w.hive == "pc" { 1 } else { 0 } }); n', 0),
    ],
)
def test_value_is_computed(evaluate: Callable[..., Any], workers: rhai.Frozen, expression: str, value: object) -> None:
    assert evaluate(expression, workers) == value


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("a.first()", None),
        ("a.last()", None),
        ("a.random()", None),
        ('a.min_by("load")', None),
        ("a.least_loaded()", None),
        ("a.find(|w| w.x == 1)", None),
        ("a.filter(|w| w.x == 1).filter(|w| w.y == 1).first()", None),
        ("a.filter(|w| w.x == 1)", []),
        ('a.sort_by("load")', []),
        ("a.map(|w| w.x)", []),
        ("a.some(|w| w.x)", False),
        ("a.all(|w| w.x)", True),
        ("a.len()", 0),
        ("a.is_empty()", True),
        ("a.reduce(|x, y| x + y, 5)", 5),
    ],
)
def test_empty_list_behaves_as_an_empty_array(evaluate: Callable[..., Any], expression: str, value: object) -> None:
    assert evaluate(expression, rhai.freeze([])) == value


def test_random_picks_every_record_in_time(evaluate: Callable[..., Any], workers: rhai.Frozen) -> None:
    picked = {evaluate("a.random()", workers).index for _ in range(400)}

    assert picked == {0, 1, 2, 3}


def test_missing_property_names_those_there_are(evaluate: Callable[..., Any], workers: rhai.Frozen) -> None:
    with pytest.raises(rhai.ScriptRuntimeError, match="no property 'hvie'; it has: gpus, hive, id"):
        evaluate('a.filter(|w| w.hvie == "pc")', workers)


def test_missing_property_is_unit_where_not_strict(workers: rhai.Frozen) -> None:
    script = rhai.Engine(strict_variables=False, timeout_s=30).compile("fn main(a) { a[0].hvie }")

    assert script.call("main", workers) is None


@pytest.mark.parametrize("expression", ["a[0].load = 0.0", "a[0].load += 1.0", "a[0] = 1", 'a[0]["load"] = 0'])
def test_records_cannot_be_changed(evaluate: Callable[..., Any], workers: rhai.Frozen, expression: str) -> None:
    with pytest.raises(rhai.ScriptRuntimeError):
        evaluate(expression, workers)

    assert workers[0]["load"] == 0.5


def test_sorting_leaves_the_list_as_it_was(evaluate: Callable[..., Any], workers: rhai.Frozen) -> None:
    assert ids(evaluate('let s = a.sort_by("load"); [a.first(), s.first()]', workers)) == "w0 w1"


@pytest.mark.parametrize("sort", ["sort_by(|w| w.load)", "sort_by(|a, b| a.load - b.load)", 'sort_by("load")'])
def test_sorting_an_array_can_be_chained(evaluate: Callable[..., Any], workers: rhai.Frozen, sort: str) -> None:
    kept = "a.filter(|w| w.load != ()).map(|w| w)"
    assert evaluate(f"{kept}.{sort}.first()", workers)["id"] == "w1"
    assert evaluate(f"let m = {kept}; m.sort_by(|w| w.load); m[0]", workers)["id"] == "w1"
    assert evaluate(f"{kept}.filter(|w| false).{sort}.first()", workers) is None


def test_freezing_again_shares_what_is_frozen(evaluate: Callable[..., Any], workers: rhai.Frozen) -> None:
    changed = {**WORKERS[1], "load": 0.9}
    again = rhai.freeze([workers[0], changed, workers[3]])
    assert again[0] == workers[0]
    assert (again[2].index, again[2]["id"], workers[3].index) == (2, "w3", 3)
    assert evaluate('a.max_by("load")', again).index == 1
    assert evaluate('a.filter(|w| w.hive == "old").first()', again).index == 2


def test_later_change_of_the_source_does_not_show(evaluate: Callable[..., Any]) -> None:
    source = [{"n": 1}]
    frozen = rhai.freeze(source)
    source[0]["n"] = 2

    assert evaluate("a[0].n", frozen) == 1


def test_thousands_of_records_pass_the_array_limit() -> None:
    many = rhai.freeze([{"n": n} for n in range(5000)])
    engine = rhai.Engine(timeout_s=30, max_operations=200_000)
    script = engine.compile('fn even(a) { a.filter(|r| r.n % 2 == 0) } fn most(a) { a.max_by("n") }')

    assert len(script.call("even", many)) == 2500
    assert script.call("most", many).index == 4999


def test_records_of_different_shapes(evaluate: Callable[..., Any]) -> None:
    mixed = rhai.freeze([{"a": 1}, {"b": 2}, {"b": 3, "a": 4}])

    assert evaluate('a.filter(|r| "b" in r).map(|r| r.b)', mixed) == [2, 3]


def test_record_is_a_mapping(workers: rhai.Frozen) -> None:
    record = workers[1]

    assert isinstance(record, Mapping)
    assert dict(record) == WORKERS[1]
    assert sorted(record) == sorted(record.keys()) == sorted(WORKERS[1])
    assert dict(record.items()) == WORKERS[1]
    assert list(record.values()) == [WORKERS[1][name] for name in record]
    assert len(record) == 6
    assert "hive" in record
    assert cast(str, 5) not in record
    assert record.get("nope", 7) == 7
    assert "pc" in repr(record)
    with pytest.raises(KeyError):
        record["nope"]


def test_frozen_is_a_sequence(workers: rhai.Frozen) -> None:
    assert len(workers) == 4
    assert [record.index for record in workers] == [0, 1, 2, 3]
    assert workers[-1] == workers[3]
    assert hash(workers[-1]) == hash(workers[3])
    assert workers[0] != rhai.freeze(WORKERS)[0]
    assert workers[0] in workers
    for index in (4, -5):
        with pytest.raises(IndexError):
            workers[index]


def test_records_go_in_again(evaluate: Callable[..., Any], workers: rhai.Frozen) -> None:
    assert evaluate("a == b[2]", workers[2], workers) is True
    assert ids(evaluate("a", [workers[2], workers[0]])) == "w2 w0"


@pytest.mark.parametrize(
    ("records", "message"),
    [([1], r"records\[0\] is a int, not a mapping"), ([{"a": b""}], r'records\[0\]\["a"\] is a bytes')],
)
def test_unfit_records_are_refused(records: Any, message: str) -> None:
    with pytest.raises(rhai.ConversionError, match=message):
        rhai.Engine.freeze(records)
