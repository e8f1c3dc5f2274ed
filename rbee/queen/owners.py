"""Whose a job, a file or a batch is: the end of its id names the queen, and the server process of hers that has it.

`job_18ea…_k3x9p21` is at process 1 of the queen k3x9p2. An id without such an end is of a queen that shares nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rbee.errors import SetupProblem

ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
NAME_CHARS = 6
TIMED = re.compile(r"(?:file-|batch_)([0-9a-f]{10})[0-9a-f]{22}(?:_|$)")
ENDING = re.compile(rf"_([a-z2-7]{{{NAME_CHARS}}})([0-9]{{1,2}})$")


class Owner(NamedTuple):
    """One server process of one queen; it keeps its slot, and what lies there on the disk, when it is replaced."""

    queen: str
    slot: int

    def __str__(self) -> str:
        return f"{self.queen}{self.slot}"


class Signature:
    """What ids that are made in this process end with."""

    text = ""

    @classmethod
    def set(cls, owner: Owner | None) -> None:
        """Sign ids from here on; None: not at all."""
        cls.text = f"_{owner}" if owner else ""


def owner_of_id(found: str) -> Owner | None:
    """Return the owner that an id names, or None."""
    match = ENDING.search(found)
    return Owner(match[1], int(match[2])) if match else None


def timed_id(prefix: str, made_at: int) -> str:
    """Return the id of a file or a batch, 32 hexadecimal digits: later ones sort after earlier ones of their second."""
    within = min(max(0, time.time_ns() - made_at * 1_000_000_000), 16**10 - 1)
    return f"{prefix}{made_at:010x}{within:010x}{secrets.token_hex(6)}{Signature.text}"


def made_at(found: str) -> int:
    """Return the second in which `timed_id` made an id, -1 of what it did not make."""
    match = TIMED.match(found)
    return int(match[1], 16) if match else -1


def queen_name(path: Path) -> str:
    """Return the name of the queen that this file holds, made by whoever comes first. Raises: SetupProblem."""
    try:
        if not path.exists():
            _make(path, "".join(secrets.choice(ALPHABET) for _ in range(NAME_CHARS)))
        name = path.read_text().strip()
    except OSError as problem:
        raise SetupProblem(f"Cannot read or make {path} ({problem.strerror})") from None
    if len(name) != NAME_CHARS or set(name) - set(ALPHABET):
        raise SetupProblem(f"The file {path} is damaged", hint=f"rm {path}; ids made before are not found then")
    return name


def _make(path: Path, name: str) -> None:
    descriptor, new = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(name)
        # Unlike a rename, a link leaves the name that another process was first to make.
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
    finally:
        os.unlink(new)
