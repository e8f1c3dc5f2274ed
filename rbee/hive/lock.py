"""One holder at a time, until it ends by any death."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Held(Exception):
    """Another process holds the lock."""


class Lock:
    """An flock(2) on a file of mode 0600; the kernel frees it when the holder dies.

    The file stays: a lock on a file that is removed and made again is no lock. Raises: Held.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise Held(str(path)) from None

    def write(self, note: bytes) -> None:
        """Leave a note for those who find the lock held; in place, because a rename would leave the lock behind."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, note, 0)

    def close(self) -> None:
        """Free the lock."""
        os.close(self._descriptor)
