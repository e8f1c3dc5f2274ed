"""Reads the structure of a GGUF file: header, metadata and tensor table, never the tensor data.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. Every count is held against the
bytes that are left and against a fixed limit before anything is allocated, so that a lie costs nothing.
What the values mean for a model is `rbee.formats.gguf_model`'s question.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NoReturn

from rbee.formats.reading import Bytes, LeftOut, Scalar, Value, shown
from rbee.formats.tensor_types import REMOVED_TYPES, TENSOR_TYPES, TensorType

MAGIC = b"GGUF"
VERSIONS = (2, 3)

MAX_KEYS = 10_000
MAX_TENSORS = 32_768
MAX_KEY_BYTES = 1024
MAX_TENSOR_NAME_BYTES = 64
MAX_STRINGS = 4 * 1024 * 1024
MAX_NESTING = 3
MAX_METADATA_BYTES = 512 * 1024 * 1024
MAX_ALIGNMENT = 16 * 1024 * 1024
MAX_ELEMENTS = 2**63 - 1
KEPT_BYTES = 4 * 1024 * 1024
KEPT_STRING_BYTES = 64 * 1024
KEPT_ARRAY_LENGTH = 1024
KEPT_TEXTS_LENGTH = 64
_KEPT_NUMBER_BYTES = 40
_SMALLEST_KEY_BYTES = 8 + 1 + 4 + 1
_SMALLEST_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

STRING, ARRAY, BOOL = 8, 9, 7
_FIXED: dict[int, tuple[str, str]] = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "B"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
_SMALLEST_ELEMENT_BYTES = {kind: struct.calcsize(form) for kind, (_, form) in _FIXED.items()} | {
    STRING: 8,
    ARRAY: 12,
}


@dataclass(frozen=True)
class ArrayAt:
    """Where an array's elements lie: its element type, their number, and the offset of the first one."""

    element: int
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of the tensor table; `offset` counts from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    size_bytes: int
    elements: int
    at: int


@dataclass
class Gguf:
    """The structure of one file. `types` and `at` tell each key's value type and the offset of its value."""

    version: int
    alignment: int = 32
    metadata: dict[str, Value] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    at: dict[str, int] = field(default_factory=dict)
    arrays: dict[str, ArrayAt] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    data_at: int = 0


def read_gguf(file: Bytes) -> Gguf:
    """Read and check the structure of a GGUF file. Raises InvalidModelFile."""
    gguf, tensor_count, key_count = _read_header(file)
    metadata = _Metadata(file, gguf)
    for _ in range(key_count):
        metadata.read_pair()
        if file.at > MAX_METADATA_BYTES:
            file.refuse(f"the metadata is longer than {MAX_METADATA_BYTES} bytes")
    gguf.alignment = _alignment(file, gguf)
    names: set[str] = set()
    for index in range(tensor_count):
        gguf.tensors.append(_read_tensor(file, index, names))
    gguf.data_at = -(-file.at // gguf.alignment) * gguf.alignment
    _check_extents(file, gguf)
    return gguf


def strings_of(file: Bytes, array: ArrayAt, what: str, limit: int) -> Iterator[bytes]:
    """Read an array's strings again, each at most `limit` bytes, without keeping them."""
    file.at = array.offset
    return file.strings(array.length, limit, what)


def _read_header(file: Bytes) -> tuple[Gguf, int, int]:
    file.take(4, "the magic")
    version = file.u32("the version")
    if version not in VERSIONS:
        _refuse_version(file, version)
    tensors = file.u64("the number of tensors")
    keys = file.u64("the number of metadata keys")
    if tensors > min(MAX_TENSORS, file.left() // _SMALLEST_TENSOR_BYTES):
        file.refuse(
            f"{tensors} tensors are claimed, more than the file can hold or the limit of {MAX_TENSORS}",
            at=8,
        )
    if keys > min(MAX_KEYS, file.left() // _SMALLEST_KEY_BYTES):
        file.refuse(
            f"{keys} metadata keys are claimed, more than the file can hold or the limit of {MAX_KEYS}",
            at=16,
        )
    return Gguf(version), tensors, keys


def _refuse_version(file: Bytes, version: int) -> NoReturn:
    if version and version & 0xFFFF == 0:
        file.refuse(
            f"the file is big-endian GGUF (version {int.from_bytes(version.to_bytes(4, 'little'), 'big')})",
            at=4,
            hint="a little-endian GGUF of the same model, or llama.cpp's gguf_convert_endian.py",
        )
    hint = "a newer rbee" if version > max(VERSIONS) else "a newer GGUF of the same model; version 1 is from 2023"
    file.refuse(f"GGUF version {version} is not known; versions 2 and 3 are", at=4, hint=hint)


def _name(file: Bytes, what: str, limit: int) -> str:
    start = file.at
    length = file.u64(f"the length of {what}")
    if not 0 < length <= limit:
        file.refuse(f"{what} has {length} bytes; 1 to {limit} are allowed", at=start)
    raw = file.take(length, what)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        file.refuse(f"{what} is not UTF-8: {shown(raw)}", at=start + 8)
    if not text.isprintable():
        file.refuse(f"{what} has control characters: {shown(raw)}", at=start + 8)
    return text


class _Metadata:
    """Reads the keys and values, within a budget of strings and of bytes to keep."""

    def __init__(self, file: Bytes, gguf: Gguf) -> None:
        self._file = file
        self._gguf = gguf
        self._strings_left = MAX_STRINGS
        self._kept_left = KEPT_BYTES

    def read_pair(self) -> None:
        file, gguf, start = self._file, self._gguf, self._file.at
        key = _name(file, "a metadata key", MAX_KEY_BYTES)
        if key in gguf.types:
            file.refuse(f"the metadata key {shown(key)} occurs twice", at=start)
        kind = file.u32(f"the type of {shown(key)}")
        gguf.at[key] = file.at
        if kind == ARRAY:
            self._read_array(key)
        elif kind == STRING:
            gguf.types[key] = "string"
            gguf.metadata[key] = self._text(key)
        elif kind in _FIXED:
            gguf.types[key] = _FIXED[kind][0]
            gguf.metadata[key] = self._number(kind, key)
        else:
            file.refuse(f"the metadata key {shown(key)} has the unknown value type {kind}", at=file.at - 4)

    def _number(self, kind: int, key: str) -> Scalar:
        (value,) = self._file.unpack("<" + _FIXED[kind][1], shown(key))
        if kind != BOOL:
            return value
        if value not in (0, 1):
            self._file.refuse(
                f"{shown(key)} is a bool of value {value}; 0 and 1 are allowed",
                at=self._file.at - 1,
            )
        return value == 1

    def _length(self, key: str) -> int:
        length = self._file.u64(f"the length of {shown(key)}")
        if length > self._file.left():
            self._file.refuse(
                f"a string of {shown(key)} claims {length} bytes, but {self._file.left()} are left",
                at=self._file.at - 8,
            )
        return length

    def _text(self, key: str) -> str | LeftOut:
        length = self._length(key)
        if length > min(KEPT_STRING_BYTES, self._kept_left):
            self._file.skip(length, shown(key))
            return LeftOut("string", length)
        self._kept_left -= length
        return self._file.take(length, shown(key)).decode("utf-8", "replace")

    def _read_array(self, key: str) -> None:
        start = self._file.at
        element, length = self._array_header(key)
        array = ArrayAt(element, length, self._file.at)
        kind = f"array of {_type_name(element)}"
        self._gguf.arrays[key], self._gguf.types[key] = array, kind
        kept = self._kept_array(array, key)
        if kept is None:
            self._file.at = start
            self._skip_array(key, MAX_NESTING)
        self._gguf.metadata[key] = LeftOut(kind, length) if kept is None else kept

    def _kept_array(self, array: ArrayAt, key: str) -> tuple[Scalar, ...] | None:
        """Return a short array's elements, or None for one that is left out."""
        if array.element in _FIXED:
            form = f"<{array.length}{_FIXED[array.element][1]}"
            if array.length > KEPT_ARRAY_LENGTH or array.length * _KEPT_NUMBER_BYTES > self._kept_left:
                return None
            self._kept_left -= array.length * _KEPT_NUMBER_BYTES
            return self._file.unpack(form, shown(key))
        if array.element != STRING or array.length > KEPT_TEXTS_LENGTH:
            return None
        texts = [self._text(key) for _ in range(array.length)]
        kept = tuple(text for text in texts if isinstance(text, str))
        return kept if len(kept) == len(texts) else None

    def _array_header(self, key: str) -> tuple[int, int]:
        """Read an array's element type and length, and refuse a length that its bytes cannot hold."""
        file, start = self._file, self._file.at
        element = file.u32(f"the element type of {shown(key)}")
        length = file.u64(f"the length of {shown(key)}")
        if element not in _SMALLEST_ELEMENT_BYTES:
            file.refuse(f"the array {shown(key)} has the unknown element type {element}", at=start)
        if length > file.left() // _SMALLEST_ELEMENT_BYTES[element]:
            file.refuse(
                f"the array {shown(key)} claims {length} elements, more than the file can hold",
                at=start + 4,
            )
        return element, length

    def _skip_array(self, key: str, depth: int) -> None:
        """Go past an array; its strings and nested arrays count against the budget."""
        element, length = self._array_header(key)
        if element in _FIXED:
            self._file.skip(length * _SMALLEST_ELEMENT_BYTES[element], shown(key))
            return
        self._strings_left -= length
        if self._strings_left < 0:
            self._file.refuse(f"the metadata holds more than {MAX_STRINGS} strings", at=self._file.at - 8)
        if depth == 0:
            self._file.refuse(
                f"the array {shown(key)} is nested more than {MAX_NESTING} deep",
                at=self._file.at - 12,
            )
        if element == STRING:
            self._file.skip_strings(length, shown(key), MAX_METADATA_BYTES)
            return
        for _ in range(length):
            self._skip_array(key, depth - 1)


def _type_name(element: int) -> str:
    return "array" if element == ARRAY else "string" if element == STRING else _FIXED[element][0]


def _alignment(file: Bytes, gguf: Gguf) -> int:
    key = "general.alignment"
    if key not in gguf.types:
        return 32
    value = gguf.metadata[key]
    if gguf.types[key] != "uint32" or not isinstance(value, int):
        file.refuse(f"{key} is a {gguf.types[key]}; it must be a uint32", at=gguf.at[key])
    if value & (value - 1) or not 8 <= value <= MAX_ALIGNMENT:
        file.refuse(
            f"{key} is {value}; it must be a power of two from 8 to {MAX_ALIGNMENT}",
            at=gguf.at[key],
        )
    return value


def _read_tensor(file: Bytes, index: int, names: set[str]) -> Tensor:
    start = file.at
    name = _name(file, f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
    if name in names:
        file.refuse(f"the tensor {shown(name)} occurs twice", at=start)
    names.add(name)
    dimensions = file.u32(f"the number of dimensions of {shown(name)}")
    if not 1 <= dimensions <= 4:
        file.refuse(
            f"the tensor {shown(name)} has {dimensions} dimensions; 1 to 4 are allowed",
            at=file.at - 4,
        )
    shape = tuple(file.u64(f"the shape of {shown(name)}") for _ in range(dimensions))
    elements = _elements(file, name, shape)
    kind = _tensor_type(file, name, shape)
    offset = file.u64(f"the offset of {shown(name)}")
    size = elements // kind.block_elements * kind.block_bytes
    return Tensor(name, shape, kind, offset, size, elements, start)


def _elements(file: Bytes, name: str, shape: tuple[int, ...]) -> int:
    elements = 1
    for length in shape:
        elements *= length
        if not 0 < elements < MAX_ELEMENTS:
            file.refuse(
                f"the tensor {shown(name)} has the impossible shape {list(shape)}",
                at=file.at - 8 * len(shape),
            )
    return elements


def _tensor_type(file: Bytes, name: str, shape: tuple[int, ...]) -> TensorType:
    number = file.i32(f"the type of {shown(name)}")
    kind = TENSOR_TYPES.get(number)
    if kind is None:
        word, hint = "unknown", "a newer rbee, or another quantization of the same model"
        if number in REMOVED_TYPES:
            word, hint = (
                "removed",
                "another quantization of the same model; llama.cpp no longer reads this one",
            )
        file.refuse(f"the tensor {shown(name)} has the {word} type {number}", at=file.at - 4, hint=hint)
    if shape[0] % kind.block_elements:
        file.refuse(
            f"the tensor {shown(name)} is {kind.name}, but its rows of {shape[0]} elements "
            f"are no multiple of {kind.block_elements}",
            at=file.at - 4,
        )
    return kind


def _check_extents(file: Bytes, gguf: Gguf) -> None:
    """Refuse tensors that are not aligned, reach past the end, or lie on one another."""
    room = file.size - gguf.data_at
    if gguf.tensors and room < 0:
        file.refuse("the file ends before the tensor data")
    for tensor in gguf.tensors:
        if tensor.offset % gguf.alignment:
            file.refuse(
                f"the tensor {shown(tensor.name)} starts at {tensor.offset}, no multiple of {gguf.alignment}",
                at=tensor.at,
            )
        if tensor.offset + tensor.size_bytes > room:
            file.refuse(
                f"the tensor {shown(tensor.name)} ends {tensor.offset + tensor.size_bytes - room} bytes past the "
                "end of the file",
                at=tensor.at,
            )
    ordered = sorted(gguf.tensors, key=lambda tensor: tensor.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.size_bytes > after.offset:
            file.refuse(f"the tensors {shown(before.name)} and {shown(after.name)} overlap", at=after.at)
