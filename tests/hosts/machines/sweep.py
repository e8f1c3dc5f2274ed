"""Take away everything that a rig left on the controller, also when its process was killed.

All of it is found by the rig's name: state folder, mounts, control groups, namespaces, links. Each rig holds a lock
on its folder while it lives, so a sweep never touches a living one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from . import network, nspawn
from .commands import RigProblem, run, wait_until

RUN = Path("/run/rbee-tests")


def main() -> None:
    """Wait for the end of standard input, that is of the process that started this one, and sweep its rig."""
    sys.stdin.read()
    # A dying process may close the pipe before the lock's file: wait for the lock.
    with claimed(Path(sys.argv[1]), wait=True) as ours:
        if ours:
            sweep(Path(sys.argv[1]))


def sweep_dead() -> None:
    """Sweep each rig whose process is gone."""
    for state in sorted(RUN.glob("*")):
        if state.is_dir():
            with claimed(state) as ours:
                if ours:
                    sweep(state)


@contextlib.contextmanager
def claimed(state: Path, *, wait: bool = False) -> Iterator[bool]:
    """Tell whether the rig is there and nobody else holds it, and keep it so."""
    try:
        lock = hold(state, wait=wait)
    except OSError:
        yield False
        return
    with lock:
        yield state.exists()


def hold(state: Path, *, wait: bool = False) -> IO[str]:
    """Lock a rig's folder until the file is closed; OSError when it is gone or, without `wait`, another's."""
    lock = (state / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        lock.close()
        raise
    return lock


def sweep(state: Path) -> None:
    """Remove the machines, network, mounts, ssh masters and files of one rig."""
    prefix = f"rb{state.name}"
    end_ssh_masters(state)
    for name in machine_names(prefix):
        nspawn.kill(name)
        network.remove(name)
    network.remove(prefix)
    unmount_below(state)
    shutil.rmtree(state)


def machine_names(prefix: str) -> set[str]:
    """Return the names of a rig's machines that have anything left."""
    places = [network.NAMESPACES, *(group.parent for group in nspawn.groups(prefix))]
    names = [path.name for place in places if place.exists() for path in place.iterdir()]
    return {name for name in names if re.fullmatch(re.escape(prefix) + r"\d+", name)}


def unmount_below(folder: Path) -> None:
    """Unmount everything below a folder; RigProblem when something stays, for then nothing there may be deleted."""
    for place in mounts_below(folder):
        try:
            run("umount", place)
        except RigProblem:
            run("umount", "--lazy", place)
    if left := mounts_below(folder):
        raise RigProblem(f"still mounted: {', '.join(left)}")


def mounts_below(folder: Path) -> list[str]:
    """Return the mount points below a folder, the innermost first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return sorted((line.split()[4] for line in lines if line.split()[4].startswith(f"{folder}/")), reverse=True)


def end_ssh_masters(folder: Path) -> None:
    """End the ssh connection masters whose sockets lie below a folder."""
    masters = [pid for pid, title in titles() if title.startswith(f"ssh: {folder}/")]
    for pid in masters:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(title.startswith(f"ssh: {folder}/") for _, title in titles()), "ssh masters to end")


def titles() -> Iterator[tuple[int, str]]:
    """Yield each process of the controller with its title."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "cmdline").read_text(errors="replace").replace("\0", " ")
