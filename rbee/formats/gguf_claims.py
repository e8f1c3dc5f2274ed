"""Asks a GGUF file's metadata for one value at a time, and refuses one of the wrong type or out of bounds."""

from __future__ import annotations

from typing import NoReturn

from rbee.formats.gguf import Gguf
from rbee.formats.reading import Bytes, LeftOut

MAX_NAME_LENGTH = 1024
_FIRST_KEY_AT = 24


class Claims:
    """Asks for one key at a time, and refuses a value of the wrong type or out of bounds."""

    def __init__(self, file: Bytes, gguf: Gguf) -> None:
        self.file = file
        self.gguf = gguf

    def refuse(self, key: str, what: str) -> NoReturn:
        self.file.refuse(f"{key} {what}", at=self.gguf.at.get(key, _FIRST_KEY_AT))

    def text(self, key: str, *, required: bool = False) -> str:
        """Return a text in one line; empty when it is absent or too long to be a name."""
        value = self.gguf.metadata.get(key)
        if not isinstance(value, str | LeftOut | None):
            self.refuse(key, f"is {a_or_an(self.gguf.types[key])}; it must be a string")
        usable = isinstance(value, str) and len(value) <= MAX_NAME_LENGTH
        if required and not (usable and value and str(value).isprintable()):
            self.refuse(key, "is missing" if value is None else "is not one printable word")
        # Names are printed: an escape sequence in one must not reach a terminal.
        return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split()) if usable else ""

    def number(self, key: str, low: int, high: int, *, required: bool = False) -> int:
        """Return an integer within bounds; 0 when the key is absent and not required."""
        value = self.gguf.metadata.get(key)
        if value is None:
            return self.refuse(key, "is missing") if required else 0
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(key, f"is {a_or_an(self.gguf.types[key])}; it must be an integer")
        if not low <= value <= high:
            self.refuse(key, f"is {value}; {low} to {high} are allowed")
        return value

    def numbers(self, key: str, blocks: int, high: int) -> tuple[int, ...]:
        """Return one integer per block, from an array or from one number that holds for all; () when absent."""
        value = self.gguf.metadata.get(key)
        if not isinstance(value, tuple | LeftOut):
            return (self.number(key, 0, high),) * blocks if value is not None else ()
        if isinstance(value, LeftOut) or any(isinstance(one, bool) or not isinstance(one, int) for one in value):
            self.refuse(
                key,
                f"is {a_or_an(self.gguf.types[key])}; it must hold one integer for each of {blocks} blocks",
            )
        if len(value) != blocks or not all(0 <= int(one) <= high for one in value):
            self.refuse(key, f"must hold {blocks} integers from 0 to {high}, one for each block")
        return tuple(int(one) for one in value)


def a_or_an(kind: str) -> str:
    return f"{'an' if kind[0] in 'ai' else 'a'} {kind}"
