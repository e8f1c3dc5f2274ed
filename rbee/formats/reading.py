"""The result of an inspection, and a reader of bytes that never reads past what it was promised."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from rbee.errors import InvalidModelFile

WINDOW_BYTES = 256 * 1024

_LENGTH = struct.Struct("<Q").unpack_from

DOWNLOAD_AGAIN = "download it again and compare its SHA-256 with the publisher's"

Scalar = int | float | bool | str


@dataclass(frozen=True)
class LeftOut:
    """A metadata value too long to keep: its type ("string", "array of string", ...) and its length."""

    type: str
    length: int


Value = Scalar | LeftOut | tuple[Scalar, ...]


@dataclass(frozen=True)
class ModelFile:
    """What a model file says about itself, once every claim was checked against its bytes.

    Zero or an empty text means that the file does not tell. `size_bytes` counts all parts of a split file.
    `capabilities` are names of `rbee.plugin.Capability`; empty for a file that is no model of its own, such as
    a vision projector or a LoRA adapter. `quantization` is in llama.cpp's words: F16, Q8_0, Q4_K_M.
    `head_count_kv`, `key_length` and `value_length` are the largest of any layer; `kv_elements_per_token` is the
    number of elements that one token adds to the key-value cache over all layers (times two for f16 bytes).
    """

    path: Path
    format: str
    size_bytes: int
    name: str = ""
    architecture: str = ""
    parameters: int = 0
    context_tokens: int = 0
    quantization: str = ""
    capabilities: tuple[str, ...] = ()
    chat_template: str | None = None
    embedding_length: int = 0
    block_count: int = 0
    head_count: int = 0
    head_count_kv: int = 0
    key_length: int = 0
    value_length: int = 0
    kv_elements_per_token: int = 0
    vocabulary_size: int = 0
    license: str = ""
    metadata: Mapping[str, Value] = field(default_factory=lambda: MappingProxyType({}))


class Bytes:
    """Read a file from front to back through a small window, and refuse it at the first lie.

    It uses `pread`, not `mmap`: a mapped file that another program cuts short kills the process with SIGBUS.
    """

    def __init__(self, descriptor: int, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.at = 0
        self._descriptor = descriptor
        self._window = b""
        self._window_at = 0

    def refuse(self, what: str, *, at: int | None = None, hint: str = DOWNLOAD_AGAIN) -> NoReturn:
        """Raise InvalidModelFile, naming the file and the byte at which the problem lies."""
        offset = self.at if at is None else at
        raise InvalidModelFile(f"{printable(self.path)}: {what} (at byte {offset})", hint=hint, param="path")

    def left(self) -> int:
        return self.size - self.at

    def need(self, count: int, what: str) -> None:
        """Refuse the file unless `count` more bytes lie in it; call this before any allocation."""
        if count > self.size - self.at:
            self.refuse(f"the file ends within {what}: {count} bytes claimed, {self.left()} left")

    def take(self, count: int, what: str) -> bytes:
        """Return the next `count` bytes."""
        self.need(count, what)
        start = self.at - self._window_at
        if start < 0 or start + count > len(self._window):
            self._fill(max(count, WINDOW_BYTES), count, what)
            start = 0
        self.at += count
        return self._window[start : start + count]

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self.at += count

    def strings(self, count: int, limit: int, what: str) -> Iterator[bytes]:
        """Yield the next `count` strings, each a uint64 length of at most `limit` and that many bytes.

        A vocabulary has some hundred thousand of them, so those that lie in the window are taken without a call.
        """
        for index in range(count):
            start = self.at - self._window_at
            if not 0 <= start <= len(self._window) - 8:
                self.take(8, what)
                self.at, start = self.at - 8, 0
            (length,) = _LENGTH(self._window, start)
            end = start + 8
            if length > limit:
                self.refuse(f"{what} {index} claims {length} bytes; {min(limit, self.left())} are allowed or left")
            if end + length <= len(self._window):
                self.at += 8 + length
                yield self._window[end : end + length]
            else:
                self.at += 8
                yield self.take(length, what)

    def skip_strings(self, count: int, what: str, limit: int) -> None:
        """Go past the next `count` strings, which must end before the offset `limit`."""
        at, size, base, window = self.at, min(self.size, limit), self._window_at, self._window
        for _ in range(count):
            if not 0 <= at - base <= len(window) - 8:
                self.at = at
                self.take(8, what)
                base, window = self._window_at, self._window
            (length,) = _LENGTH(window, at - base)
            if length > size - at - 8:
                self.refuse(f"a string of {what} claims {length} bytes, but {max(0, size - at - 8)} are left", at=at)
            at += 8 + length
        self.at = at

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def i32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little", signed=True)

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def unpack(self, form: str, what: str) -> tuple[int | float, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form), what))

    def _fill(self, length: int, needed: int, what: str) -> None:
        self._window = os.pread(self._descriptor, length, self.at)
        self._window_at = self.at
        if len(self._window) < needed:
            self.refuse(
                f"the file became shorter while {what} was read",
                hint="wait until it is written, then try again",
            )


def shown(raw: bytes | str, limit: int = 60) -> str:
    """Return untrusted text in quotes, escaped and cut, fit for one line of a log."""
    text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw
    return ascii(text if len(text) <= limit else text[:limit] + "...")


def printable(path: Path) -> str:
    """Return a path as it is, or escaped and in quotes when it would disturb a log or a terminal."""
    text = str(path)
    return text if text.isprintable() and len(text) <= 1000 else shown(text, 1000)
