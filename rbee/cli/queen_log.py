"""The log of a queen that was started in the background."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

LIMIT_BYTES = 4 * 1024 * 1024
KEPT = 3


STAMP = re.compile(r"\[?\d{4}-\d\d-\d\d[T ][\d:,.]+( [+-]\d{4})?\]?( \[\d+\])?( \[?[A-Z]+\]?)? *")
"""Time, process and level, as Python's logging and gunicorn put them before a message."""
WORST = re.compile(r"^rbee: |error|critical|fail", re.IGNORECASE)


def last_words(lines: Sequence[str]) -> str:
    """Return the line of a log that tells best why a program ended, without time and level."""
    told = [line for line in lines if line.strip() and not line[0].isspace() and not line.startswith("Traceback")]
    worst = [line for line in told if WORST.search(line)]
    best = (worst or told or [""])[-1]
    return STAMP.sub("", best, count=1).removeprefix("rbee: ").strip()


def rotate(path: Path) -> None:
    """Put a log aside that has grown over its limit, and forget the oldest of those put aside."""
    if not path.exists() or path.stat().st_size < LIMIT_BYTES:
        return
    for number in range(KEPT - 1, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(f"{path.name}.{number}").replace(path.with_name(f"{path.name}.{number + 1}"))
    path.replace(path.with_name(f"{path.name}.1"))
