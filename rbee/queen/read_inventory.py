"""Read an inventory in a process of its own: `python -m rbee.queen.read_inventory FOLDER` writes a `Reading` as JSON.

The commands of a `Match exec`, slow disks and whatever else a file may ask for then cannot hold up a stream.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
from msgspec import Struct

from rbee.errors import InvalidInventory, RbeeError
from rbee.inventory.fleet import Fleet
from rbee.wire.fleet import Problem


class Reading(Struct, frozen=True, kw_only=True):
    """What an inventory says, or everything that is wrong with it."""

    fleet: Fleet | None = None
    mistakes: list[Problem] = []


def main() -> None:
    """Read the folder that the command line names."""
    sys.stdout.buffer.write(encode(read_here(Path(sys.argv[1]))))


def read_here(folder: Path) -> Reading:
    """Read an inventory in this process."""
    from rbee.inventory import read

    try:
        return Reading(fleet=read(folder))
    except InvalidInventory as problem:
        return Reading(mistakes=[_problem(one.at, one.message, one.hint) for one in problem.mistakes])
    except RbeeError as problem:
        return Reading(mistakes=[_problem(str(folder), problem.message, problem.hint)])


def encode(reading: Reading) -> bytes:
    """Return a reading as JSON."""
    return msgspec.json.encode(reading, enc_hook=str)  # the only foreign type is Path


def decode(data: bytes) -> Reading:
    """Return the reading that `encode` wrote. Raises: msgspec.DecodeError."""
    return msgspec.json.decode(data, type=Reading, dec_hook=lambda type_, value: type_(value))


def _problem(where: str, message: str, hint: str | None) -> Problem:
    return Problem(where=where, message=f"{message}. Try: {hint}" if hint else message)


if __name__ == "__main__":
    main()
