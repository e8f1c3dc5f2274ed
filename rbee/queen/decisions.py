"""The routing decisions of late, on disk, so that a new script can be tried against yesterday's jobs.

Lines of JSON in `decisions.jsonl` and its rotated forms `.1` to `.3`: `{"places": N, "workers": […]}` tells what the
places of a decision looked like, `{"at": …, "task": …, "places": N, "chosen": [ID, …]}` is a decision. A prompt's text
is never there.
The event loop only appends to a list; a thread encodes and writes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import gevent
import msgspec
from gevent.threadpool import ThreadPool

log = logging.getLogger("rbee.queen.decisions")

FLUSH_EVERY_S = 0.5
PER_FLUSH = 100
"""How many decisions of half a second are kept; of more, the first ones."""
PLACES_EVERY_S = 5.0
"""How old the facts of workers may be that a decision refers to."""
MAX_BYTES = 32 * 1024 * 1024
KEPT_FILES = 4

Record = Mapping[str, Any]
MAX_KEYS = 256


class DecisionLog:
    """Writes decisions to a bounded set of files; what it cannot write is left out, and never holds a job up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pool = ThreadPool(1)
        self._waiting: list[dict[str, Any]] = []
        self._count = 0
        self._places: dict[Hashable, tuple[int, float]] = {}
        self._number = time.time_ns()
        self._broken = False

    def note(self, task: Record, key: Hashable, workers: Iterable[Record], chosen: Sequence[str], by: str) -> None:
        """Keep one decision. `key` names the set of places, whose facts are written again when they are old."""
        if self._count >= PER_FLUSH:
            return
        self._count += 1
        now = time.time()
        number, written_at = self._places.get(key, (0, 0.0))
        if now - written_at > PLACES_EVERY_S:
            if len(self._places) > MAX_KEYS:
                self._places.clear()
            self._number = number = self._number + 1
            self._places[key] = (number, now)
            self._waiting.append({"at": now, "places": number, "workers": list(workers)})
        self._waiting.append({"at": now, "places": number, "task": dict(task), "chosen": chosen, "by": by})

    def run(self) -> NoReturn:
        """Write for ever what was noted."""
        while True:
            gevent.sleep(FLUSH_EVERY_S)
            self.flush()

    def flush(self) -> None:
        """Write what was noted, in a thread."""
        lines, self._waiting, self._count = self._waiting, [], 0
        if not lines:
            return
        problem = self._pool.apply(self._write, (lines,))
        if problem is not None:
            if not self._broken:
                log.warning("%s cannot be written (%s); decisions are not kept", self.path, problem.strerror)
            self._broken = True
            # What refers to places that were lost would be of no use.
            self._places.clear()
        else:
            self._broken = False

    def since(self, moment: float) -> Iterator[bytes]:
        """Yield the lines since a moment (Unix time), and the places that they refer to, the oldest first."""
        for path in reversed(self._all()):
            try:
                with path.open("rb") as file:
                    yield from (line for line in file if _at(line) >= moment - PLACES_EVERY_S and line.endswith(b"\n"))
            except OSError:
                continue

    def _all(self) -> list[Path]:
        """Return every file, those of other server processes too, whose names begin the same."""
        stem = self.path.name.partition(".")[0].partition("-")[0]
        logs = {self.path, *self.path.parent.glob(f"{stem}.jsonl"), *self.path.parent.glob(f"{stem}-*.jsonl")}
        return [path for log in sorted(logs) for path in files(log)]

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> OSError | None:
        # gevent logs what is raised in a thread, with its stack.
        try:
            self._append(lines)
        except OSError as problem:
            return problem
        return None

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        data = b"".join(msgspec.json.encode(line, enc_hook=dict) + b"\n" for line in lines)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, data)
            full = os.fstat(descriptor).st_size > MAX_BYTES
        finally:
            os.close(descriptor)
        if full:
            _rotate(self.path)
            self._places.clear()


def files(path: Path) -> list[Path]:
    """Return the log's files, the newest first."""
    return [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, KEPT_FILES))]


def _rotate(path: Path) -> None:
    names = files(path)
    for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
        if newer.exists():
            os.replace(newer, older)


def _at(line: bytes) -> float:
    try:
        return msgspec.json.decode(line, type=_Line).at
    except msgspec.DecodeError:
        return float("-inf")


class _Line(msgspec.Struct):
    at: float = 0.0
