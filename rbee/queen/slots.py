"""Each server process of a queen has a slot, 0 to N-1: its number, its part of the state folder, its own socket.

The kernel drops the lock of a process that dies in whatever way, so its successor gets the same slot, and with it the
records, and the jobs, that the dead one left.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rbee import paths
from rbee.errors import SetupProblem

WAIT_S = 20.0
LOOK_EVERY_S = 0.02
SOCKET_PATH_LIMIT_BYTES = 100
"""sun_path holds 108 bytes on Linux and 104 on macOS (unix(7))."""
BACKLOG = 512


class NoSlot(Exception):
    """Every slot is taken: an earlier process has not ended yet."""


def take(folder: Path, count: int, *, wait_s: float = WAIT_S, sleep: Callable[[float], None] = time.sleep) -> int:
    """Take the first free slot of `count` for as long as this process lives, and return its number.

    Raises: NoSlot when none gets free within `wait_s`.
    """
    paths.private(folder)
    deadline = time.monotonic() + wait_s
    while True:
        for number in range(count):
            if _locked(folder / f"slot-{number}.lock"):
                return number
        if time.monotonic() > deadline:
            raise NoSlot
        sleep(LOOK_EVERY_S)


def _locked(path: Path) -> bool:
    # Never closed: the lock is this process' for its life.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    return True


def socket_path(state_dir: Path, slot: int) -> Path:
    """Return where the process in a slot listens to the others of its queen. Raises: SetupProblem."""
    folder, name = paths.runtime_dir(), f"process-{slot}.sock"
    if len(os.fsencode(folder / name)) > SOCKET_PATH_LIMIT_BYTES:
        folder = _short(hashlib.sha256(os.fsencode(state_dir.absolute())).hexdigest()[:16])
    return folder / name


def listen(path: Path) -> socket.socket:
    """Listen on a Unix socket that only this user may use. The slot's lock must be held. Raises: SetupProblem."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
    except OSError as problem:
        listener.close()
        raise SetupProblem(f"Cannot listen on {path} ({problem.strerror})") from None
    return listener


def _short(name: str) -> Path:
    """Return a private folder with a short path. Raises: SetupProblem when it is somebody else's."""
    # The temporary folder of a Mac's user has a long path of its own.
    base = "/tmp" if sys.platform == "darwin" else tempfile.gettempdir()
    folder = Path(base) / f"rbee-{name}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as problem:
        raise SetupProblem(f"Cannot make the folder {folder} ({problem.strerror})") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise SetupProblem(f"{folder} is not a private folder of this user", hint=f"rm -r {folder}")
    return folder
