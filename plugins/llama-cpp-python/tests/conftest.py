"""Fixtures: the real engine with the built-in model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# pytest's importlib mode puts no test folder on the path.
sys.path.insert(0, str(Path(__file__).parent))

from llama_bench import Bench, open_bench


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    """Eight slots of 512 tokens."""
    bench = open_bench()
    yield bench
    bench.backend.close()


@pytest.fixture
def make_bench() -> Iterator[Callable[..., Bench]]:
    """Load with other settings; closed after the test."""
    opened: list[Bench] = []

    def make(**changes: object) -> Bench:
        opened.append(open_bench(**changes))
        return opened[-1]

    yield make
    for one in opened:
        one.backend.close()
