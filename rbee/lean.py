"""Keep small what a machine runs many of: the memory of hives and workers."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

M_ARENA_MAX = -8


@contextlib.contextmanager
def without_typing_extensions() -> Iterator[None]:
    """Import msgspec without typing_extensions, which would be a sixth of a hive's memory.

    msgspec takes two names from it where it is installed and from `typing` elsewhere.
    """
    absent = "typing_extensions" not in sys.modules
    if absent:
        sys.modules["typing_extensions"] = None  # type: ignore[assignment]  # importing it raises ImportError
    try:
        yield
    finally:
        if absent:
            del sys.modules["typing_extensions"]


def give_back_free_memory() -> None:
    """Return to the system what imports and a start have used and freed (malloc_trim(3))."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def share_one_arena() -> None:
    """Keep glibc from giving each thread a heap of its own (mallopt(3)): threads come and go with connections."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
