"""The jobs that ended a moment ago, in a file that a killed process leaves readable, until the database has them.

A line is appended with one write(2) before the client has the end of its answer. It costs about a microsecond, and
the kernel keeps it whatever becomes of this process; only a power cut can take the last moments. Two files take
turns, so that one can be emptied once its lines are committed while the other is written.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from msgspec import Struct

from rbee import paths
from rbee.queen.access import Caller


class Ended(Struct, frozen=True, array_like=True):
    """One ended request, as the tables `jobs` and `usage` take it."""

    id: str
    owner: str
    key: str
    endpoint: str
    model: str
    status: str
    created_at: float
    ended_at: float
    worker: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    estimated: bool = False
    """The engine told no tokens; these are the queen's estimate."""


def owner_of(caller: Caller) -> str:
    """Return whose records a caller's are: the tenant's where there is one, else the key's own."""
    # The two kinds of names may coincide; whose records they are must not.
    return f"tenant:{caller.tenant}" if caller.tenant else f"key:{caller.id}"


def caller_text(caller: Caller) -> str:
    """Return who a caller is and what is allowed to it, as a job keeps it until it is run."""
    return msgspec.json.encode(caller).decode()


def caller_of(text: str) -> Caller:
    """Return the caller of a job that waited."""
    return msgspec.json.decode(text, type=Caller)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Ended)


class Ledger:
    """Two append-only files of mode 0600 in one folder, and the rows that are in them."""

    def __init__(self, folder: Path) -> None:
        paths.private(folder)
        self._paths = [folder / "ended-a.jsonl", folder / "ended-b.jsonl"]
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._files = [os.open(path, flags, 0o600) for path in self._paths]
        self._current = 0
        self._busy = False
        self.rows: list[Ended] = [row for path in self._paths for row in _read(path)]
        """What the database does not have; at first what an earlier process left."""

    def add(self, row: Ended) -> None:
        """Note a row. Raises: OSError when the disk is full; the row is kept in memory all the same."""
        self.rows.append(row)
        line = _encoder.encode(row) + b"\n"
        if os.write(self._files[self._current], line) != len(line):
            # The rest of a line that was cut must not run into the next one.
            os.write(self._files[self._current], b"\n")

    def take(self) -> list[Ended]:
        """Return the rows to commit; later ones go to the other file."""
        rows, self.rows = self.rows, []
        if rows and not self._busy:
            self._busy = True
            self._current ^= 1
        return rows

    def done(self) -> None:
        """Empty the file whose rows are committed. Called in the thread that committed them."""
        if self._busy:
            os.ftruncate(self._files[self._current ^ 1], 0)
            self._busy = False

    def failed(self, rows: list[Ended]) -> None:
        """Take back rows that could not be committed."""
        self.rows[:0] = rows

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            os.close(file)


def _read(path: Path) -> list[Ended]:
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(_decoder.decode(line))
        except msgspec.DecodeError:
            continue  # cut by a full disk; every other line is whole
    return rows
