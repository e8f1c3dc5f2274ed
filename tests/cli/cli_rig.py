"""`rbee` as a person runs it: a process of its own, with a home folder of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HANG_GUARD_S = 120.0


@dataclass
class Person:
    """Someone with a home folder and a current folder, who types commands."""

    home: Path
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, *words: str, program: str = "rbee") -> list[str]:
        """Return what runs one of the four programs of this checkout."""
        module, function = {
            "rbee": ("rbee.cli.main", "main"),
            "rbee-keeper": ("rbee.cli.main", "main"),
            "queen-rbee": ("rbee.cli.programs", "queen"),
            "rbee-hive": ("rbee.cli.programs", "hive"),
            "worker-rbee": ("rbee.cli.programs", "worker"),
        }[program]
        code = f"import sys; sys.argv[0] = {program!r}; from {module} import {function}; sys.exit({function}())"
        return [sys.executable, "-P", "-c", code, *words]

    def env(self, **more: str) -> dict[str, str]:
        """Return the environment of this person's commands."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RBEE_", "LLORCH_", "XDG_"))}
        ports = {"RBEE_QUEEN_PORT": "0", "RBEE_HIVE_PORT": "0"}
        return {**kept, **ports, "RBEE_HOME": str(self.home), **self.environment, **more}

    def rbee(
        self, *words: str, stdin: str | bytes = b"", program: str = "rbee", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        given = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            self.command(*words, program=program),
            input=given,
            capture_output=True,
            cwd=self.folder,
            env=self.env(**environment),
            timeout=HANG_GUARD_S,
            check=False,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def start(self, *words: str, program: str = "rbee", **environment: str) -> subprocess.Popen[bytes]:
        """Start a command; the test ends it."""
        return subprocess.Popen(
            self.command(*words, program=program),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            env=self.env(**environment),
            # A shell starts its background jobs with SIGINT ignored, and tests may be such a job.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def processes(self) -> dict[int, str]:
        """Return the processes that have this home (proc(5)), with their command lines."""
        return processes_with(f"RBEE_HOME={self.home}")


def processes_with(mark: str) -> dict[int, str]:
    """Return the live processes whose environment holds an entry that begins with `mark`."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            entries = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if command and any(item.startswith(mark.encode()) for item in entries):
                found[int(entry.name)] = command
    return found


def wait_until(condition: Callable[[], object], what: str, limit_s: float = HANG_GUARD_S) -> None:
    """Wait for a condition; the limit is a guard against hanging only."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.02)
