"""The conformance tests of every backend, in a real worker process."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
import pytest
from llama_bench import DEMO

from rbee.testing import BackendContract, run_worker
from rbee.wire.fleet import WorkerSpec


@pytest.fixture(scope="class")
def spec() -> WorkerSpec:
    """The built-in model with four slots, which embeds as well."""
    return WorkerSpec(
        name="llama-cpp-python-1",
        backend="llama-cpp-python",
        model="rbee-demo",
        path=str(DEMO),
        context_tokens=1024,
        slots=4,
        options={"pooling": "mean"},
    )


class TestLlamaCppPython(BackendContract):
    needed: ClassVar[frozenset[str]] = frozenset({"chat", "completion", "embedding"})
    # The built-in model ends its answers soon; a schema keeps it writing until its context is full.
    long_answer: ClassVar[dict[str, Any]] = {
        "max_tokens": 100_000,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "long", "schema": {"type": "string", "minLength": 1000}},
        },
    }


def test_a_schema_holds_over_http(spec: WorkerSpec) -> None:
    schema = {"type": "object", "properties": {"host": {"enum": ["é", "b"]}}, "required": ["host"]}
    form = {"type": "json_schema", "json_schema": {"name": "host", "schema": schema}}
    with run_worker(spec) as worker:
        answer = worker.chat("Which host?", response_format=form, temperature=0, max_tokens=100)
    assert msgspec.json.decode(answer["choices"][0]["message"]["content"])["host"] in ("é", "b")
