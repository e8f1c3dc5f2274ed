"""A GGUF file in pieces, so that a test can change one claim and leave the rest as it was."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SIZES = {U8: 1, I8: 1, U16: 2, I16: 2, U32: 4, I32: 4, F32: 4, BOOL: 1, U64: 8, I64: 8, F64: 8}


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: bytes | str, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw) if length is None else length) + raw


def array(kind: int, elements: list[bytes], length: int | None = None) -> bytes:
    return u32(kind) + u64(len(elements) if length is None else length) + b"".join(elements)


@dataclass
class Pair:
    """One metadata key and its value as bytes; `length` lies about the key's length."""

    key: bytes
    kind: int
    value: bytes
    length: int | None = None

    def encode(self) -> bytes:
        return text(self.key, self.length) + u32(self.kind) + self.value


@dataclass
class Row:
    """One row of the tensor table; `dimensions` lies about the length of the shape."""

    name: bytes
    shape: list[int]
    kind: int
    offset: int
    dimensions: int | None = None
    length: int | None = None

    def encode(self) -> bytes:
        count = len(self.shape) if self.dimensions is None else self.dimensions
        shape = b"".join(u64(length) for length in self.shape)
        return text(self.name, self.length) + u32(count) + shape + u32(self.kind) + u64(self.offset)


@dataclass
class Draft:
    """All pieces of a file; `keys` and `tensors` lie about how many follow."""

    pairs: list[Pair] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: bytes = u32(3)
    keys: int | None = None
    tensors: int | None = None
    alignment: int = 32

    def encode(self) -> bytes:
        head = self.magic + self.version + u64(len(self.rows) if self.tensors is None else self.tensors)
        head += u64(len(self.pairs) if self.keys is None else self.keys)
        head += b"".join(piece.encode() for piece in self.pieces())
        return head + b"\0" * (-len(head) % self.alignment) + self.data

    def pieces(self) -> list[Pair | Row]:
        return [*self.pairs, *self.rows]

    def boundaries(self) -> list[int]:
        """Return the offset at which each piece of the header begins, and that of the data."""
        offsets, at = [0, 4, 8, 16, 24], 24
        for piece in self.pieces():
            offsets += [at + 8, at + 8 + len(piece.key if isinstance(piece, Pair) else piece.name)]
            at += len(piece.encode())
            offsets.append(at)
        return [*offsets, at + -at % self.alignment]

    def pair(self, key: str) -> Pair:
        return next(pair for pair in self.pairs if pair.key == key.encode())

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name.encode())

    def put(self, key: str, kind: int, value: bytes) -> None:
        """Set a key's value, or add the key."""
        self.pairs = [pair for pair in self.pairs if pair.key != key.encode()] + [Pair(key.encode(), kind, value)]

    def drop(self, key: str) -> None:
        self.pairs.remove(self.pair(key))


class _Cursor:
    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, count: int) -> bytes:
        self.at += count
        return self.raw[self.at - count : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def value(self, kind: int) -> bytes:
        start = self.at
        if kind == STRING:
            self.take(self.number(8))
        elif kind == ARRAY:
            element, length = self.number(4), self.number(8)
            for _ in range(length):
                self.value(element)
        else:
            self.take(SIZES[kind])
        return self.raw[start : self.at]


def read_draft(path: Path) -> Draft:
    """Take a good file apart."""
    cursor = _Cursor(path.read_bytes())
    draft = Draft(magic=cursor.take(4), version=cursor.take(4))
    tensors, keys = cursor.number(8), cursor.number(8)
    for _ in range(keys):
        key, kind = cursor.take(cursor.number(8)), cursor.number(4)
        draft.pairs.append(Pair(key, kind, cursor.value(kind)))
    for _ in range(tensors):
        name = cursor.take(cursor.number(8))
        shape = [cursor.number(8) for _ in range(cursor.number(4))]
        draft.rows.append(Row(name, shape, cursor.number(4), cursor.number(8)))
    draft.data = cursor.raw[cursor.at + -cursor.at % 32 :]
    return draft
