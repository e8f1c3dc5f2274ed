from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import rhai

PRELUDE = """
fn least_loaded() { this.min_by("load") }
fn admit() { #{ admit: true } }
fn reject(reason) { #{ admit: false, reason: reason } }
"""


@pytest.fixture
def engine() -> rhai.Engine:
    # The deadline is generous: on a busy machine a test must not fail for being descheduled.
    return rhai.Engine(timeout_s=30, prelude=PRELUDE)


@pytest.fixture
def evaluate(engine: rhai.Engine) -> Callable[..., Any]:
    """Run an expression with the arguments named a, b, c."""

    def run(expression: str, *args: object) -> Any:
        names = ", ".join("abc"[: len(args)])
        return engine.compile(f"fn main({names}) {{ {expression} }}").call("main", *args)

    return run
