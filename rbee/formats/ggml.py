"""Reads the model files from before GGUF ("ggml", 2022-2023), as ctransformers and whisper.cpp load them.

Such a file has no metadata: a magic, some integers, the vocabulary, then one record per tensor up to the end of the
file. The order of the integers depends on the model family, which the file does not name. So every family's layout is
tried, and the one under which all records end exactly at the end of the file is the right one.
Source of the layouts: the loaders of ctransformers 0.2.27 and whisper.cpp.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import NamedTuple, NoReturn

from rbee.errors import InvalidModelFile
from rbee.formats.ggml_layouts import BOUNDS, LAYOUTS, Layout
from rbee.formats.reading import Bytes, ModelFile, shown
from rbee.formats.tensor_types import FILE_TYPES, TENSOR_TYPES
from rbee.plugin import Capability

MAGICS: Mapping[bytes, str] = {
    b"lmgg": "ggml",
    b"fmgg": "ggmf",
    b"tjgg": "ggjt",
    b"ccgg": "ggcc",
    b"algg": "ggla",
}
_VERSIONS = {"ggmf": (1,), "ggjt": (1, 2, 3), "ggcc": (10,)}

MAX_WORD_BYTES = 64 * 1024
MAX_TENSORS = 32_768
MAX_TENSOR_NAME_BYTES = 256
MAX_ELEMENTS = 2**31 - 1
MAX_CONFIG_BYTES = 1024 * 1024
_QUANTIZATION_VERSION = 2
_QUANTIZATION_FACTOR = 1000
_FLOATS = frozenset({0, 1})
_TYPES = frozenset({0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14})
_REQUANTIZE = "a GGUF of the same model; files quantized before May 2023 are read by no current engine"

_FILE_TYPES = frozenset({0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 14})
_FIRST_K_MIXTURE = 10
_LLAMA_FILE_TYPES = _FILE_TYPES | {4, 15, 16, 17, 18}
"""Numbers below 10 mean the same to all; above, llama and falcon count small and medium mixtures apart."""

_SAME = {"gptbigcode": "starcoder"}
_MARKS = {b"<fim_prefix>": "starcoder", b"<fim-prefix>": "starcoder", b"### End": "dolly-v2"}
"""Tokens by which families that share a layout differ."""


class Tensor(NamedTuple):
    """One record, without its data."""

    name: str
    shape: tuple[int, ...]
    type: int


@dataclass(frozen=True)
class Read:
    """What one layout made of a file; `marks` are the tokens met by which families that share it differ."""

    layout: Layout
    sizes: Mapping[str, int]
    parameters: int
    quantization: str
    marks: frozenset[bytes]


def read_ggml_model(file: Bytes, model_type: str = "") -> ModelFile:
    """Read a model file from before GGUF. Raises InvalidModelFile."""
    kind = MAGICS[file.take(4, "the magic")]
    if kind == "ggla":
        file.refuse(
            "this is a LoRA adapter, not a model",
            at=0,
            hint="the base model that the adapter belongs to",
        )
    version = 0
    if kind in _VERSIONS:
        version = file.u32("the version")
        if version not in _VERSIONS[kind]:
            known = ", ".join(str(number) for number in _VERSIONS[kind])
            file.refuse(f"{kind} version {version} is not known; {known} are", at=4)
    named = model_type or _configured_type(file)
    read = _read_any(file, kind, version, named)
    return _model(file, read, _family(file, read, named, insist=bool(model_type)))


def _read_any(file: Bytes, kind: str, version: int, named: str) -> Read:
    """Try every layout that this magic may have.

    When none fits, tell what stopped the named family, or else the layout that came furthest.
    """
    start, furthest, problem = file.at, -1, None
    for layout in LAYOUTS:
        if kind not in layout.magics:
            continue
        file.at = start
        try:
            return _read_as(file, layout, kind, version)
        except InvalidModelFile as error:
            reached = file.size if _plain(named) in map(_plain, layout.names) else file.at
            if reached > furthest:
                furthest, problem = reached, error
    if problem is None:
        file.refuse(f"no family is known to use {kind} files", at=0)
    raise problem


def _read_as(file: Bytes, layout: Layout, kind: str, version: int) -> Read:
    sizes = _read_sizes(file, layout)
    if layout.filters:
        _skip_filters(file)
    if layout.counted and file.u32("the number of tokens") != sizes["vocabulary"]:
        file.refuse(f"as {layout.names[0]}: the vocabulary's length differs from the header's {sizes['vocabulary']}")
    marks = _read_vocabulary(file, layout, sizes["vocabulary"])
    if kind == "ggcc":
        _skip_merges(file, sizes["merges"])
    tensors = _read_tensors(file, layout, sizes, aligned=kind in ("ggjt", "ggcc"))
    types = {tensor.type for tensor in tensors}
    quantized = types - _FLOATS
    old = version < 3 if kind in ("ggjt", "ggmf") else sizes["ftype"] // _QUANTIZATION_FACTOR < _QUANTIZATION_VERSION
    if quantized and old and kind != "ggcc":
        file.refuse("the file has an old quantization format", at=4, hint=_REQUANTIZE)
    mixture = sizes["ftype"] % _QUANTIZATION_FACTOR
    name = FILE_TYPES.get(mixture, "") if mixture < _FIRST_K_MIXTURE or not layout.each else ""
    return Read(
        layout, sizes, sum(prod(tensor.shape) for tensor in tensors), name or TENSOR_TYPES[max(types)].name, marks
    )


def _read_sizes(file: Bytes, layout: Layout) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for field in layout.fields:
        at, value = file.at, file.i32(f"the header ({field})")
        bounds = BOUNDS[field]
        if bounds and not bounds[0] <= value <= bounds[1]:
            file.refuse(
                f"as {layout.names[0]}: {field} is {value}; {bounds[0]} to {bounds[1]} are allowed",
                at=at,
            )
        sizes[field] = value
    if sizes["width"] % sizes["heads"]:
        file.refuse(f"as {layout.names[0]}: {sizes['heads']} heads do not divide a width of {sizes['width']}")
    # One head makes the GPT-2 loader of ctransformers 0.2.27 write out of bounds.
    if sizes["heads"] == 1 and not layout.filters:
        file.refuse(f"as {layout.names[0]}: a single attention head, with which engines crash")
    known = _FILE_TYPES if layout.each or layout.filters else _LLAMA_FILE_TYPES
    if sizes["ftype"] % _QUANTIZATION_FACTOR not in known:
        file.refuse(f"as {layout.names[0]}: the file type {sizes['ftype']} is not known")
    if sizes.get("context", 1) * sizes["width"] * sizes["layers"] > MAX_ELEMENTS:
        file.refuse(f"as {layout.names[0]}: the key-value cache would have more than {MAX_ELEMENTS} elements")
    return sizes


def _skip_filters(file: Bytes) -> None:
    """Go past whisper's mel filters."""
    bands, bins = file.u32("the mel filters"), file.u32("the mel filters")
    if not (0 < bands <= 1024 and 0 < bins <= 65_536):
        file.refuse(f"as whisper: {bands} mel filters of {bins} bins are claimed")
    file.skip(4 * bands * bins, "the mel filters")


def _read_vocabulary(file: Bytes, layout: Layout, length: int) -> frozenset[bytes]:
    """Go past the vocabulary; return which of the words that tell families apart are in it."""
    file.need(length * (8 if layout.scored else 4), "the vocabulary")
    marks: set[bytes] = set()
    for index in range(length):
        word = _word(file, f"token {index}")
        if word in _MARKS:
            marks.add(word)
        if layout.scored:
            file.skip(4, "a token's score")
    return frozenset(marks)


def _word(file: Bytes, what: str) -> bytes:
    length = file.u32(f"the length of {what}")
    if length > MAX_WORD_BYTES:
        file.refuse(f"{what} claims {length} bytes; {MAX_WORD_BYTES} are allowed", at=file.at - 4)
    return file.take(length, what)


def _skip_merges(file: Bytes, claimed: int) -> None:
    count = file.u32("the number of merges")
    if count != claimed or count > file.left() // 8:
        file.refuse(f"{count} merges are claimed, and {claimed} in the header", at=file.at - 4)
    for _ in range(2 * count):
        _word(file, "a merge")


def _read_tensors(file: Bytes, layout: Layout, sizes: Mapping[str, int], *, aligned: bool) -> list[Tensor]:
    """Go past all tensor records, and check that they are the ones that the header promises."""
    tensors: dict[str, Tensor] = {}
    while file.left():
        start = file.at
        tensor = _read_tensor(file, layout, aligned=aligned)
        if tensor.name in tensors:
            file.refuse(f"the tensor {shown(tensor.name)} occurs twice", at=start)
        if len(tensors) == MAX_TENSORS:
            file.refuse(f"the file has more than {MAX_TENSORS} tensors", at=start)
        tensors[tensor.name] = tensor
    _check_layers(file, layout, sizes["layers"], tensors)
    embeddings = (sizes["width"], sizes["vocabulary"])
    if not any(tensor.shape == embeddings for tensor in tensors.values()):
        file.refuse(f"as {layout.names[0]}: no tensor has the shape of the token embeddings, {list(embeddings)}")
    return list(tensors.values())


def _check_layers(file: Bytes, layout: Layout, layers: int, names: Iterable[str]) -> None:
    """Refuse missing or surplus layers: the loaders leave what they do not find as it was in memory."""
    number = re.compile(re.escape(layout.layer) + r"(\d{1,4})\b")
    tensors_of = Counter(int(found[1]) for found in map(number.match, names) if found)
    if set(tensors_of) != set(range(layers)):
        file.refuse(f"as {layout.names[0]}: the header promises {layers} layers, the file has {len(tensors_of)}")
    for layer, count in tensors_of.items():
        if layout.each and count != layout.each:
            file.refuse(f"as {layout.names[0]}: layer {layer} has {count} tensors; {layout.each} are needed")


def _read_tensor(file: Bytes, layout: Layout, *, aligned: bool) -> Tensor:
    """Go past one record: dimensions, length of the name, type, shape, name, padding to 32 where aligned, data."""
    start = file.at
    dimensions, length, number = (file.u32("a tensor's header") for _ in range(3))
    most = 3 if layout.filters else 2
    if not 1 <= dimensions <= most or not 0 < length <= MAX_TENSOR_NAME_BYTES:
        file.refuse(f"a tensor claims {dimensions} dimensions and a name of {length} bytes", at=start)
    if number not in _TYPES:
        file.refuse(f"a tensor has the unknown or removed type {number}", at=start + 8, hint=_REQUANTIZE)
    shape = tuple(file.u32("a tensor's shape") for _ in range(dimensions))
    name = file.take(length, "a tensor's name")
    kind = TENSOR_TYPES[number]
    elements = prod(shape)
    if not 0 < elements <= MAX_ELEMENTS or shape[0] % kind.block_elements:
        file.refuse(f"the tensor {shown(name)} has the impossible shape {list(shape)} for {kind.name}", at=start)
    if aligned:
        file.skip(-file.at % 32, "padding")
    file.skip(elements // kind.block_elements * kind.block_bytes, f"the tensor {shown(name)}")
    return Tensor(name.decode("utf-8", "backslashreplace"), shape, number)


def _family(file: Bytes, read: Read, named: str, *, insist: bool) -> str:
    """Tell the family: as it was named, or what the layout or a token says; "" when that leaves two."""
    fits = {_plain(name): name for name in read.layout.names}
    if _plain(named) in fits:
        return fits[_plain(named)]
    if insist:
        _refuse_family(file, named, read)
    if len(read.layout.names) == 1:
        return read.layout.names[0]
    return next((name for mark, name in _MARKS.items() if mark in read.marks and name in read.layout.names), "")


def _plain(family: str) -> str:
    """Return a family's name as ctransformers compares it: letters and digits only, and one name for each."""
    plain = "".join(letter for letter in family if letter.isalnum())
    return _SAME.get(plain, plain)


def _refuse_family(file: Bytes, model_type: str, read: Read) -> NoReturn:
    names = " or ".join(read.layout.names)
    file.refuse(
        f"model_type is {shown(model_type)}, but the file is laid out as {names}",
        at=4,
        hint=f"model_type={names}",
    )


def _configured_type(file: Bytes) -> str:
    """Return `model_type` of the config.json beside the file, as ctransformers reads it; "" when there is none."""
    path = file.path.with_name("config.json")
    try:
        with path.open("rb") as stream:
            config = json.loads(stream.read(MAX_CONFIG_BYTES)) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return ""
    named = config.get("model_type") if isinstance(config, dict) else None
    return named if isinstance(named, str) and len(named) < 64 else ""


def _model(file: Bytes, read: Read, family: str) -> ModelFile:
    sizes, whisper = read.sizes, read.layout.filters
    heads = sizes["heads"]
    heads_kv = sizes.get("heads_kv", heads)
    head_length = sizes["width"] // heads
    capabilities = (Capability.TRANSCRIPTION,) if whisper else (Capability.CHAT, Capability.COMPLETION)
    return ModelFile(
        path=file.path,
        format="ggml",
        size_bytes=file.size,
        name=file.path.stem,
        architecture=family,
        parameters=read.parameters,
        context_tokens=sizes.get("context", 2048),
        quantization=read.quantization,
        capabilities=tuple(capability.value for capability in capabilities),
        embedding_length=sizes["width"],
        block_count=sizes["layers"],
        head_count=heads,
        head_count_kv=heads_kv,
        key_length=head_length,
        value_length=head_length,
        kv_elements_per_token=2 * sizes["layers"] * heads_kv * head_length,
        vocabulary_size=sizes["vocabulary"],
        metadata=MappingProxyType({"ggml." + key: value for key, value in sizes.items() if key != "float"}),
    )
