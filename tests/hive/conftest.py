"""The fixtures of the hive's tests; what they hand out is in `hive_rig`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from hive_rig import ENGINES, TRIAL, FakeQueen, RunningHive, StartHive, install, processes_of, until


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder for everything that rbee keeps; afterwards nothing may run that was started with it."""
    yield tmp_path / "home"
    try:
        until(lambda: not processes_of(tmp_path / "home"), "every process to end", 20)
    finally:
        for pid in processes_of(tmp_path / "home"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """The folder in which the trial engines are installed."""
    install(tmp_path / "plugins", ENGINES)
    return tmp_path / "plugins"


@pytest.fixture
def environment(home: Path, plugins: Path) -> dict[str, str]:
    path = os.pathsep.join([str(TRIAL), str(plugins), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "RBEE_HOME": str(home), "PYTHONPATH": path, "PYTHONWARNINGS": "default"}


@pytest.fixture
def start_hive(home: Path, environment: dict[str, str]) -> Iterator[StartHive]:
    """Start hives; each is stopped at the end."""
    started: list[RunningHive] = []

    def start(*arguments: str, port: int = 0, **more: str) -> RunningHive:
        home.mkdir(exist_ok=True)
        with open(home / "hive.log", "a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "rbee.hive", "run", "--port", str(port), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**environment, **more},
            )
        started.append(RunningHive(process, home))
        return started[-1]

    yield start
    for hive in started:
        if hive.process.poll() is None:
            hive.terminate()
        hive.client.close()
        assert hive.process.stdout
        hive.process.stdout.close()
    log = (home / "hive.log").read_text() if (home / "hive.log").exists() else ""
    assert "Traceback" not in log, log


@pytest.fixture
def hive(start_hive: StartHive) -> RunningHive:
    return start_hive("--ephemeral")


@pytest.fixture
def queen() -> Iterator[FakeQueen]:
    queen = FakeQueen()
    yield queen
    queen.close()
