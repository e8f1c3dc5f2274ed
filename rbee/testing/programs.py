"""Start real rbee programs for a test, on free ports and in a folder of their own."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from rbee.client import Client
from rbee.errors import RbeeError
from rbee.wire.fleet import QueenRecord, QueenStatus

START_TIMEOUT_S = 60.0


@dataclass
class RunningQueen:
    """A queen with its hive. `url` ends without a slash; `home` is its RBEE_HOME."""

    home: Path
    url: str
    process: subprocess.Popen[str]
    record: QueenRecord
    log: list[str]

    @functools.cached_property
    def client(self) -> Client:
        """Return a client with the operator's token; it is closed with the queen."""
        return Client(self.url, token=self.record.token, timeout_s=30.0)

    def status(self) -> QueenStatus:
        """Return the queen's status."""
        return self.client.get("/v1/orchestrator/status", QueenStatus)

    def hive_pid(self) -> int:
        """Return the process id of the queen's hive."""
        return self.client_of_hive().get("/health", dict[str, object])["pid"]  # type: ignore[return-value]

    def client_of_hive(self) -> Client:
        """Return a client of the hive with its token."""
        token = (self.home / "state" / "hive.token").read_text().strip()
        return Client(self.status().hives[0].url, token=token)


@contextlib.contextmanager
def running_queen(
    *arguments: str, home: Path | None = None, env: dict[str, str] | None = None
) -> Iterator[RunningQueen]:
    """Start `python -m rbee.queen run`, wait until her own hive, if any, has reported its engines, and end both.

    Raises: RuntimeError with the queen's log when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="rbee-test-") as folder:
        where = home or Path(folder)
        command = [sys.executable, "-m", "rbee.queen", "run", "--port", "0", "--hive-port", "0", *arguments]
        environment = {**os.environ, "RBEE_HOME": str(where), **(env or {})}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=where
        )
        log: list[str] = []
        reader = threading.Thread(target=_read, args=(process, log), daemon=True)
        reader.start()
        try:
            queen = _wait(where, process, log)
            with contextlib.closing(queen.client):
                yield queen
        finally:
            end(process)
            reader.join(10)
            if process.stdout:
                process.stdout.close()


def end(process: subprocess.Popen[str], timeout_s: float = 60.0) -> None:
    """Ask a program to end, and kill it when it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def processes_of(home: Path) -> list[tuple[int, str]]:
    """Return the processes that run with this RBEE_HOME, as (pid, command line)."""
    marker = f"RBEE_HOME={home}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if marker in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command:  # a zombie has none
                    found.append((int(entry.name), command.strip()))
    return found


def until(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    """Wait until `condition()` is true. The limit only guards against hanging. Raises: AssertionError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.02)


def _read(process: subprocess.Popen[str], log: list[str]) -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError):
        for line in process.stdout:
            log.append(line.rstrip())


def _wait(home: Path, process: subprocess.Popen[str], log: list[str]) -> RunningQueen:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        line = next((line for line in log if re.match(r"listening on http://", line)), "")
        if line and (home / "state" / "queen.json").exists():
            record = msgspec.json.decode((home / "state" / "queen.json").read_bytes(), type=QueenRecord)
            queen = RunningQueen(home, line.split()[-1], process, record, log)
            with contextlib.suppress(RbeeError):
                status = queen.status()
                alone = {"--no-hive", "--settings"} & set(process.args)  # type: ignore[arg-type]
                if alone or any(hive.engines for hive in status.hives):
                    return queen
        time.sleep(0.02)
    end(process)
    raise RuntimeError("the queen did not start:\n" + "\n".join(log))
