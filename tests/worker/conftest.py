"""Workers that the tests of this folder share; they leave them well."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from rbee.testing import RunningWorker, run_worker
from rbee.testing.models import write_random_gguf
from rbee.testing.plugins import BACKEND, install
from rbee.wire.fleet import WorkerSpec


@pytest.fixture(scope="session")
def demo_file() -> Path:
    """Return the built-in model's file."""
    return Path(str(resources.files("rbee") / "models" / "rbee-demo.gguf"))


@pytest.fixture(scope="session")
def demo_spec(demo_file: Path) -> WorkerSpec:
    return WorkerSpec(name="demo", backend="xllamacpp", model="rbee-demo", path=str(demo_file))


@pytest.fixture(scope="session")
def slow_spec(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    """Return a model whose answers take seconds: it never ends by itself."""
    file = write_random_gguf(tmp_path_factory.mktemp("slow") / "slow.gguf", 27_000_000)
    return WorkerSpec(name="slow", backend="xllamacpp", model="slow", path=str(file))


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


@pytest.fixture
def slow_plugin(tmp_path: Path) -> dict[str, str]:
    """Return the environment with a plugin whose load takes longer than any test."""
    body = "def load(self, spec, progress): time.sleep(600)"
    return install(tmp_path, "slow", BACKEND.format(name="slow", body=body))
