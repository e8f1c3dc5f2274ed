"""The processes of this machine: what each one is, since when, and to whom it belongs (proc(5))."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PROC = Path("/proc")


def command_line(pid: int) -> list[str]:
    """Return the words of a process's command line; empty for one that has ended or is a zombie."""
    if (PROC / "self").exists():
        try:
            words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").rstrip("\0")
        except OSError:
            return []
        return words.split("\0") if words else []
    shown = subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return shown.stdout.split()


def start_time(pid: int) -> float | None:
    """Return when a process began, in seconds since 1970, or None where that cannot be known (proc(5))."""
    try:
        ticks = int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in (PROC / "stat").read_text().splitlines() if line.startswith("btime"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def processes_with(entry: str) -> list[int]:
    """Return the other processes that have this entry in their environment; none where there is no /proc."""
    return [
        int(process.name)
        for process in PROC.glob("[0-9]*")
        if int(process.name) != os.getpid() and os.fsencode(entry) in _environment(process)
    ]


def _environment(process: Path) -> list[bytes]:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return []
