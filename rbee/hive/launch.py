"""Starts worker processes, from one thread that lives as long as the hive."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from rbee.hive import observe
from rbee.paths import private, write_private
from rbee.wire.fleet import WorkerSpec

log = logging.getLogger("rbee.hive")

MARK = "RBEE_WORKER"
"""The environment variable by which everything that a worker starts is known as this worker's."""
LOG_LIMIT_BYTES = 4 * 1024 * 1024
LOGS_KEPT = 100
CHATTER = re.compile(r"\d{4}-\d\d-\d\d \S+ (DEBUG|INFO) ")
"""How a line of a worker's log begins that tells of no trouble."""
SOCKET_PATH_LIMIT_BYTES = 100
"""sun_path holds 108 bytes on Linux and 104 on macOS (unix(7))."""


class ProcessRecord(Struct, frozen=True, kw_only=True):
    """A file beside a worker's, by which the next hive finds what a killed one left running."""

    name: str
    pid: int
    start_ticks: int
    command: list[str]


class Launcher:
    """The one starter of worker processes.

    A worker asks Linux to kill it when its parent dies (PR_SET_PDEATHSIG, see `rbee.lifeline`). "Parent" means the
    *thread* that forked it: had the thread of an HTTP request started the worker, the kernel would kill the worker
    as soon as that request's connection closed, while it loads or in the middle of an answer, and nothing would say
    why. So requests hand their starts to `run`, which the main thread runs until the process ends.
    """

    def __init__(self, folder: Path, logs: Path, command: Sequence[str]) -> None:
        self.folder = private(folder)
        self._logs = private(logs)
        self._command = tuple(command)
        self._tasks: deque[Callable[[], None]] = deque()
        self._stopped = False
        self._thread: int | None = None
        # A pipe, not a queue or an Event: Linux may hand a signal to any thread, and a main thread that waits for a
        # lock then sleeps on. What `signal.set_wakeup_fd` writes wakes it whichever thread was interrupted.
        self._reader, self.wake_fd = os.pipe()
        os.set_blocking(self.wake_fd, False)

    def run(self) -> None:
        """Run what is submitted until `stop`; call it once, from the thread that ends last."""
        self._thread = threading.get_ident()
        while not self._stopped:
            os.read(self._reader, 4096)
            while self._tasks and not self._stopped:
                self._tasks.popleft()()

    def submit(self, task: Callable[[], None]) -> None:
        """Have a task run in the starter's thread."""
        self._tasks.append(task)
        self._wake()

    def stop(self) -> None:
        """Let `run` return. Safe in a signal handler."""
        self._stopped = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes it just as well
            os.write(self.wake_fd, b"t")

    def start(self, spec: WorkerSpec) -> Child:
        """Start a worker, its output appended to its log. Raises: OSError."""
        assert threading.get_ident() == self._thread, "a worker's parent must be the thread that lives longest"
        spec_path = self.spec_path(spec.name)
        write_private(spec_path, msgspec.json.encode(spec))
        command = [*self._command, "run", "--spec", str(spec_path)]
        _rotate(self.log_path(spec.name))
        with open(self.log_path(spec.name), "ab") as output:
            log_start = output.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, MARK: spec.name},
            )
        child = Child(process, self.log_path(spec.name), log_start)
        started = observe.start_ticks(child.pid)
        record = ProcessRecord(name=spec.name, pid=child.pid, start_ticks=started, command=command)
        write_private(self.folder / f"{spec.name}.json", msgspec.json.encode(record))
        return child

    def forget_spec(self, name: str) -> None:
        """Delete a worker's spec file; it holds a token, and is of no use once the worker has read it."""
        self.spec_path(name).unlink(missing_ok=True)

    def clear(self, name: str) -> None:
        """Delete what a worker that has ended leaves in the runtime folder."""
        for suffix in (".spec.json", ".json", ".sock"):
            (self.folder / f"{name}{suffix}").unlink(missing_ok=True)

    def spec_path(self, name: str) -> Path:
        return self.folder / f"{name}.spec.json"

    def log_path(self, name: str) -> Path:
        return self._logs / f"worker-{name}.log"

    def socket_path(self, name: str) -> str:
        """Return where a worker's engine may put its Unix socket, empty when the path is too long for one."""
        path = str(self.folder / f"{name}.sock")
        return path if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT_BYTES else ""

    def prune_logs(self) -> None:
        """Keep the newest logs only."""
        logs = sorted(self._logs.glob("worker-*.log*"), key=_modified, reverse=True)
        for old in logs[LOGS_KEPT:]:
            old.unlink(missing_ok=True)


class Child:
    """A running worker process, leader of its own session and process group."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path, log_start: int) -> None:
        self.pid = process.pid
        self._process = process
        self._log_path = log_path
        self._log_start = log_start
        self._lock = threading.Lock()

    def terminate(self) -> None:
        """Ask the worker itself to end; what it started is its to end."""
        with self._lock:
            if self._process.returncode is None:
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the worker and everything in its process group."""
        with self._lock:
            if self._process.returncode is None:
                os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> str:
        """Wait for the end of the process and return it in words."""
        if not hasattr(os, "waitid"):
            return exit_words(self._process.wait())
        # WNOWAIT leaves a zombie, which keeps the number taken: a signal sent meanwhile cannot hit a stranger.
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            os.killpg(self.pid, signal.SIGKILL)  # what the worker started and did not end
            return exit_words(self._process.wait())

    def last_words(self) -> str:
        """Return the last line of weight that this process wrote, printable and at most 300 characters long."""
        try:
            with open(self._log_path, "rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_start, end - 8192) if end >= self._log_start else 0)
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return ""
        shown = (_printable(line) for line in reversed(lines))
        return next((line[:300] for line in shown if line and not CHATTER.match(line)), "")


def exit_words(code: int) -> str:
    """Say how a process ended, from its return code as `subprocess` has it: "exit code 1", "killed by SIGKILL"."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _printable(line: str) -> str:
    return "".join(c for c in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) if c.isprintable()).strip()


def _rotate(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_LIMIT_BYTES:
            path.replace(path.with_name(path.name + ".1"))


def _modified(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0
