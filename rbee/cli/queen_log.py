"""The log of a queen that was started in the background."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIMIT_BYTES = 4 * 1024 * 1024
KEPT = 3


STAMP = re.compile(r"\[?\d{4}-\d\d-\d\d[T ][\d:,.]+( [+-]\d{4})?\]?( \[\d+\])?( \[?[A-Z]+\]?)? *")
"""Time, process and level, as Python's logging and gunicorn put them before a message."""
EXCEPTION = re.compile(r"    (\w+\.)*[A-Z]\w*: ")
"""The last line of a traceback in the queen's log, where further lines of a record are indented."""
WORST = re.compile(r"^rbee: |error|critical|fail", re.IGNORECASE)


def last_words(lines: Sequence[str]) -> str:
    """Return the line of a log that tells best why a program ended, without time and level."""
    told = [line for line in map(_text, lines) if line.strip() and not line[0].isspace()]
    told = [line for line in told if not line.startswith("Traceback")]
    worst = [line for line in told if WORST.search(line)]
    best = (worst or told or [""])[-1]
    return STAMP.sub("", best, count=1).removeprefix("rbee: ").strip()


def _text(line: str) -> str:
    """Return a record as text; of one in JSON with a traceback, the end of that, which is what happened."""
    if not line.startswith("{"):
        return line.removeprefix("    ") if EXCEPTION.match(line) else line
    import msgspec

    try:
        told = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError:
        return line
    message = str(told.get("exception") or told.get("message")).strip().rpartition("\n")[2]
    return f"{str(told.get('time')).removesuffix('Z')} {told.get('level')} {message}"


def rotate(path: Path) -> None:
    """Put a log aside that has grown over its limit, and forget the oldest of those put aside."""
    if not path.exists() or path.stat().st_size < LIMIT_BYTES:
        return
    for number in range(KEPT - 1, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(f"{path.name}.{number}").replace(path.with_name(f"{path.name}.{number + 1}"))
    path.replace(path.with_name(f"{path.name}.1"))
