"""What a process and all that came of it hold in memory, read from Linux's /proc (proc(5))."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def family_memory_bytes(pid: int, root: Path = Path("/")) -> int:
    """Return the memory that a process and what it started hold: a worker with its engine, whatever its session."""
    return memory_bytes(pid, root) + sum(family_memory_bytes(child, root) for child in children(pid, root))


def memory_bytes(pid: int, root: Path = Path("/")) -> int:
    """Return the memory that a process holds (its resident set), 0 when it is gone."""
    try:
        return int((root / f"proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0


def children(pid: int, root: Path = Path("/")) -> list[int]:
    """Return the processes that a process has started, or taken over from one of its own that ended."""
    tasks = root / f"proc/{pid}/task"
    found: list[int] = []
    with contextlib.suppress(OSError):  # it may end meanwhile
        for task in os.listdir(tasks):
            with contextlib.suppress(OSError):
                found += map(int, (tasks / task / "children").read_text().split())
    return found
