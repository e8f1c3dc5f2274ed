"""The real engine with a tiny model, and ways to run jobs on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

# pytest's importlib mode puts no test folder on the path.
sys.path.insert(0, str(Path(__file__).parent))

from ctransformers_bench import Bench

from rbee.plugin import ModelSpec
from rbee.testing.models import write_gpt2_ggml


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a context of 128 tokens."""
    return write_gpt2_ggml(tmp_path_factory.mktemp("models") / "tiny.bin", context=128)


@pytest.fixture
def make_bench(model_file: Path) -> Iterator[Callable[..., Bench]]:
    """Load with other settings; closed after the test."""
    opened: list[Bench] = []

    def make(**changes: object) -> Bench:
        spec = ModelSpec("tiny", model_file, format="ggml", options={"model_type": "gpt2"})
        opened.append(Bench(replace(spec, **changes)))  # type: ignore[arg-type]  # a test's own changes
        return opened[-1]

    yield make
    for bench in opened:
        bench.backend.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    """The tiny model."""
    return make_bench()
