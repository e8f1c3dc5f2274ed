"""Workers that the tests of this folder share; they leave them well."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from rbee.testing import RunningWorker, run_worker
from rbee.wire.fleet import WorkerSpec


@pytest.fixture(scope="session")
def demo_file() -> Path:
    """Return the built-in model's file."""
    return Path(str(resources.files("rbee") / "models" / "rbee-demo.gguf"))


@pytest.fixture(scope="session")
def demo_spec(demo_file: Path) -> WorkerSpec:
    return WorkerSpec(name="demo", backend="xllamacpp", model="rbee-demo", path=str(demo_file))


@pytest.fixture(scope="session")
def demo(demo_spec: WorkerSpec) -> Iterator[RunningWorker]:
    """Return a worker of the serving shape."""
    with run_worker(demo_spec) as worker:
        yield worker


@pytest.fixture(scope="session")
def echo() -> Iterator[RunningWorker]:
    """Return a worker of the answering shape."""
    with run_worker(WorkerSpec(name="echo", backend="echo", model="echo", context_tokens=4096)) as worker:
        yield worker


@pytest.fixture(params=["echo", "demo"])
def worker(request: pytest.FixtureRequest) -> RunningWorker:
    """Return a worker of either shape: a client must not see a difference."""
    found: RunningWorker = request.getfixturevalue(request.param)
    return found
