"""Values go into a script and come back unchanged, or are refused with the place that is wrong."""

from __future__ import annotations

import datetime
import enum
import math
from collections import OrderedDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest

import rhai


class Color(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -(2**63),
        2**63 - 1,
        1.5,
        -0.0,
        math.inf,
        "",
        "naïve 😀 \x00",
        [],
        {},
        [1, "a", None, [2.5, [True]]],
        {"a": {"b": [{"c": None}]}, "with space": 1, "": 2},
    ],
    ids=repr,
)
def test_value_comes_back_the_same(evaluate: Callable[..., Any], value: object) -> None:
    back = evaluate("a", value)

    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    ("value", "back"),
    [
        ((1, (2, 3)), [1, [2, 3]]),
        (Color.RED, "red"),
        (Level.HIGH, 3),
        (OrderedDict(b=1, a=2), {"a": 2, "b": 1}),
        (MappingProxyType({"a": 1}), {"a": 1}),
    ],
    ids=repr,
)
def test_close_relatives_become_the_plain_type(evaluate: Callable[..., Any], value: object, back: object) -> None:
    assert evaluate("a", value) == back


def test_nan_stays_nan(evaluate: Callable[..., Any]) -> None:
    assert math.isnan(evaluate("a", math.nan))


def test_bool_is_not_an_integer_in_the_script(evaluate: Callable[..., Any]) -> None:
    assert evaluate("type_of(a) + type_of(b)", True, 1) == "booli64"


def test_script_changes_its_own_copy(evaluate: Callable[..., Any]) -> None:
    mine = {"list": [1]}

    assert evaluate("a.list.push(2); a", mine) == {"list": [1, 2]}
    assert mine == {"list": [1]}


def test_character_becomes_str(evaluate: Callable[..., Any]) -> None:
    assert evaluate("'é'") == "é"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"x", "argument 1 is a bytes"),
        (bytearray(), "argument 1 is a bytearray"),
        ({1, 2}, "argument 1 is a set"),
        ({"when": [datetime.date(2024, 1, 1)]}, 'argument 1["when"][0] is a date'),
        ({1: 2}, "argument 1 has a int as a key"),
        ("\ud800", "argument 1 holds a lone surrogate"),
        (object(), "argument 1 is a object"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_types_are_refused_by_place(evaluate: Callable[..., Any], value: object, message: str) -> None:
    with pytest.raises(rhai.ConversionError) as raised:
        evaluate("a", value)

    assert message in str(raised.value)
    assert isinstance(raised.value, TypeError)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**400])
def test_integer_beyond_64_bits_is_refused(evaluate: Callable[..., Any], value: int) -> None:
    with pytest.raises(rhai.IntegerRangeError, match=r'argument 1\["n"\]') as raised:
        evaluate("a", {"n": value})

    assert isinstance(raised.value, OverflowError)


def test_cycle_is_refused(evaluate: Callable[..., Any]) -> None:
    cycle: list[object] = [1]
    cycle.append({"again": cycle})

    with pytest.raises(rhai.ConversionError, match="contains itself"):
        evaluate("a", cycle)


def test_same_container_twice_is_no_cycle(evaluate: Callable[..., Any]) -> None:
    shared = [1]

    assert evaluate("a", [shared, shared]) == [[1], [1]]


def test_nesting_too_deep_is_refused(evaluate: Callable[..., Any]) -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]

    with pytest.raises(rhai.ConversionError, match="deeper than 64"):
        evaluate("a", deep)


@pytest.mark.parametrize("expression", ["|x| x", "[#{ a: |x| x }]", "0..3"])
def test_result_without_a_python_form_is_refused(evaluate: Callable[..., Any], expression: str) -> None:
    with pytest.raises(rhai.ConversionError, match="no Python form"):
        evaluate(expression)


def test_inputs_larger_than_the_limits_can_be_read(evaluate: Callable[..., Any]) -> None:
    large = list(range(5000))

    assert evaluate("a[4999] + a.len()", large) == 9999
    assert evaluate("b.items[4999]", None, {"items": large}) == 4999
