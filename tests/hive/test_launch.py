"""Files around a worker's process."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from rbee.hive import launch
from rbee.hive.launch import Child, Launcher, exit_words
from rbee.wire.fleet import WorkerSpec

PRINT_SPEC = (
    "import os, sys; print(os.stat(sys.argv[3]).st_mode & 0o777, open(sys.argv[3]).read(), os.environ['RBEE_WORKER'])"
)


def run_here(launcher: Launcher, spec: WorkerSpec) -> Child:
    """Start a worker from this thread, as the main thread of a hive does."""
    started: list[Child] = []
    launcher.submit(lambda: started.append(launcher.start(spec)))
    launcher.submit(launcher.stop)
    launcher.run()
    return started[0]


def test_the_spec_is_private_and_everything_goes_when_it_has_ended(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path / "run", tmp_path / "logs", [sys.executable, "-c", PRINT_SPEC])
    spec = WorkerSpec(name="w", backend="b", model="m", token="secret")
    child = run_here(launcher, spec)
    assert child.wait() == "exit code 0"
    mode, rest = launcher.log_path("w").read_text().split(" ", 1)
    assert int(mode) == 0o600
    text, _, mark = rest.rpartition(" ")
    assert msgspec.json.decode(text, type=WorkerSpec) == spec
    assert mark.strip() == "w"
    assert "secret" not in (tmp_path / "run/w.json").read_text()
    launcher.clear("w")
    assert list((tmp_path / "run").iterdir()) == []


def test_no_other_thread_may_start_a_worker(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path / "run", tmp_path / "logs", ["true"])
    launcher.stop()
    launcher.run()
    refused: list[type[BaseException]] = []

    def start() -> None:
        try:
            launcher.start(WorkerSpec(name="w", backend="b", model="m"))
        except AssertionError as problem:
            refused.append(type(problem))

    other = threading.Thread(target=start)
    other.start()
    other.join()
    assert refused == [AssertionError]


def test_the_last_words_are_those_of_this_start(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path / "run", tmp_path / "logs", [sys.executable, "-c", "pass"])
    launcher.log_path("w").write_text("an old trouble\n")
    child = run_here(launcher, WorkerSpec(name="w", backend="b", model="m"))
    child.wait()
    assert child.last_words() == ""
    with open(launcher.log_path("w"), "a") as log:
        log.write("a new trouble\n\n2026-01-01 10:00:00,000 INFO ready\n")
    assert child.last_words() == "a new trouble"


def test_a_log_that_grew_is_put_aside_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher(tmp_path / "run", tmp_path / "logs", [sys.executable, "-c", "print('new')"])
    launcher.log_path("w").write_bytes(b"x" * (launch.LOG_LIMIT_BYTES + 1))
    run_here(launcher, WorkerSpec(name="w", backend="b", model="m")).wait()
    assert launcher.log_path("w").read_text() == "new\n"
    assert (tmp_path / "logs/worker-w.log.1").stat().st_size == launch.LOG_LIMIT_BYTES + 1
    for number in range(launch.LOGS_KEPT + 5):
        path = launcher.log_path(f"n{number}")
        path.touch()
        os.utime(path, (number, number))
    launcher.prune_logs()
    left = {path.name for path in (tmp_path / "logs").iterdir()}
    assert len(left) == launch.LOGS_KEPT
    assert {"worker-w.log", "worker-w.log.1"} <= left
    assert "worker-n0.log" not in left


def test_a_socket_path_that_is_too_long_is_none(tmp_path: Path) -> None:
    deep = Launcher(tmp_path / ("d" * 90), tmp_path / "logs", ["true"])
    assert deep.socket_path("w") == ""
    deep.folder = Path("/run/user/1000/rbee/workers")
    assert deep.socket_path("w") == "/run/user/1000/rbee/workers/w.sock"
    assert deep.socket_path("w" * 80) == ""


def test_ends_in_words() -> None:
    assert [exit_words(code) for code in (0, 1, -9, -6, -62)] == [
        "exit code 0",
        "exit code 1",
        "killed by SIGKILL",
        "killed by SIGABRT",
        "killed by signal 62",
    ]
