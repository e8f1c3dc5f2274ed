"""What this machine has and what its processes use, read from Linux's /proc and /sys (proc(5), cgroups(7))."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from rbee.process_memory import PAGE_BYTES
from rbee.wire.fleet import Device

UNLIMITED = 2**60
"""cgroup v1 says "no limit" with a number near 2**63."""


def devices(root: Path = Path("/")) -> list[Device]:
    """Return the devices that a model can run on."""
    return [cpu(root)]


def cpu(root: Path = Path("/")) -> Device:
    """Return the processor as a device; its memory is what this process may use, in bytes."""
    total, free = _memory(root)
    for limit, used in _cgroup_limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return Device(
        kind="cpu",
        name=f"{_processor(root)}, {cores()} cores",
        memory_total_bytes=total,
        memory_free_bytes=free,
    )


def cores() -> int:
    """Return how many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_ticks(pid: int, root: Path = Path("/")) -> int:
    """Return when a process started, in clock ticks since boot, or 0 when it is gone or a zombie.

    With its number this names one process: numbers are used again, and start times tell them apart.
    """
    fields = _stat(pid, root)
    return int(fields[19]) if len(fields) > 19 and fields[0] not in ("Z", "X") else 0


def session_members(session: int, root: Path = Path("/")) -> Iterator[int]:
    """Yield the processes of a session (setsid(2))."""
    for name in os.listdir(root / "proc") if (root / "proc").is_dir() else ():
        if name.isdigit():
            fields = _stat(int(name), root)
            if len(fields) > 3 and fields[3] == str(session) and fields[0] not in ("Z", "X"):
                yield int(name)


def command_line(pid: int, root: Path = Path("/")) -> list[str]:
    """Return a process's arguments, empty when it is gone."""
    return _nul_separated(root / f"proc/{pid}/cmdline")


def environment(pid: int, root: Path = Path("/")) -> list[str]:
    """Return the environment that a process was started with, empty when it is gone or another person's."""
    return _nul_separated(root / f"proc/{pid}/environ")


def _nul_separated(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape").rstrip("\0").split("\0")
    except OSError:
        return []


def _stat(pid: int, root: Path) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on; the second, a name in brackets, may hold anything."""
    try:
        return (root / f"proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return []


def _processor(root: Path) -> str:
    try:
        lines = (root / "proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model", "Hardware")))
    return next((" ".join(name.split()) for name in names if name), platform.machine() or "cpu")


def _memory(root: Path) -> tuple[int, int]:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
        return kibibytes["MemTotal"] * 1024, kibibytes["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        total = os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES
        return total, total


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, used) of each control group above this process that limits its memory."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _limits_upward(root / "sys/fs/cgroup", path, "memory.max", "memory.current")
        elif controllers == "memory":
            base = root / "sys/fs/cgroup/memory"
            yield from _limits_upward(base, path, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _limits_upward(base: Path, path: str, limit_file: str, used_file: str) -> Iterator[tuple[int, int]]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for length in range(len(parts), -1, -1):
        folder = base.joinpath(*parts[:length])
        try:
            limit = (folder / limit_file).read_text().strip()
            if limit != "max" and int(limit) < UNLIMITED:
                yield int(limit), int((folder / used_file).read_text())
        except (OSError, ValueError):
            continue
