"""Run git and `rbee` as programs that are bounded in time and end with this one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rbee.errors import SetupProblem, ShuttingDown, TimedOut
from rbee.lifeline import die_with_parent

LOOK_EVERY_S = 0.1
GRACE_S = 5.0


@dataclass(frozen=True)
class Done:
    """How a program ended."""

    code: int
    output: str
    errors: str

    @property
    def words(self) -> str:
        """What it said for a person, on both outputs."""
        return (self.errors.strip() or self.output.strip())[-4000:]


class Programs:
    """Starts programs; `stopping` ends the one that runs, and raises ShuttingDown where it was waited for."""

    def __init__(self, stopping: threading.Event) -> None:
        self.stopping = stopping

    def run(self, command: Sequence[str], *, limit_s: float, env: Mapping[str, str], cwd: Path | None = None) -> Done:
        """Run a program to its end, without a terminal. Raises: TimedOut, ShuttingDown, SetupProblem."""
        # Files, not pipes: a connection that ssh keeps open in the background would hold a pipe for a minute.
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            parent = os.getpid()
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=dict(env), cwd=cwd,
                    start_new_session=True, preexec_fn=lambda: die_with_parent(parent),
                )  # fmt: skip
            except FileNotFoundError:
                name = command[0]
                raise SetupProblem(f"There is no {name} program here", hint=f"apt-get install {name}") from None
            try:
                code = self._wait(process, command, limit_s)
            finally:
                _end(process)
            return Done(code, _text(output), _text(errors))

    def _wait(self, process: subprocess.Popen[bytes], command: Sequence[str], limit_s: float) -> int:
        deadline = time.monotonic() + limit_s
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(LOOK_EVERY_S)
            if self.stopping.is_set():
                raise ShuttingDown("The reconciler is being stopped")
            if time.monotonic() > deadline:
                raise TimedOut(f"`{' '.join(command[:2])} …` did not end within {limit_s:g} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and what it started. What an apply began on a host ends there by itself."""
    if process.poll() is not None:
        return
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
            return


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
