"""Reads a GGUF model whole: one file, or all parts of a split one (NAME-00001-of-00003.gguf)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NoReturn

from rbee.formats.gguf import Gguf, read_gguf
from rbee.formats.gguf_model import model_of
from rbee.formats.reading import Bytes, ModelFile, shown

MAX_PARTS = 1024
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def read_gguf_model(file: Bytes) -> ModelFile:
    """Read a GGUF model from its file, or from its first part. Raises InvalidModelFile."""
    match = _PART.fullmatch(file.path.name)
    if match and int(match["number"]) != 1:
        _refuse_later_part(file, match["stem"], int(match["number"]), int(match["count"]))
    gguf = read_gguf(file)
    count = _number(file, gguf, "split.count")
    if count <= 1:
        return model_of(file, gguf, [gguf], file.size)
    if match is None or int(match["count"]) != count:
        file.refuse(
            f"the file is part 1 of {count}, but its name does not say so",
            at=gguf.at["split.count"],
            hint=f"rename the parts to NAME-00001-of-{count:05}.gguf and so on; llama.cpp finds them by name",
        )
    if _number(file, gguf, "split.no") != 0:
        _refuse_later_part(file, match["stem"], _number(file, gguf, "split.no") + 1, count)
    parts, size_bytes = _read_parts(file, gguf, match["stem"], count)
    return model_of(file, gguf, parts, size_bytes)


def _number(file: Bytes, gguf: Gguf, key: str) -> int:
    value = gguf.metadata.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int):
        file.refuse(f"{key} is a {gguf.types[key]}; it must be an integer", at=gguf.at[key])
    if not 0 <= value <= MAX_PARTS:
        file.refuse(f"{key} is {value}; 0 to {MAX_PARTS} are allowed", at=gguf.at[key])
    return value


def _refuse_later_part(file: Bytes, stem: str, number: int, count: int) -> NoReturn:
    first = file.path.with_name(f"{stem}-00001-of-{count:05}.gguf")
    file.refuse(f"this is part {number} of {count} of a model", at=0, hint=f"the first part: {first}")


def _read_parts(file: Bytes, first: Gguf, stem: str, count: int) -> tuple[list[Gguf], int]:
    """Read the structure of every part, and check that together they hold the tensors that the first one promises."""
    paths = [file.path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [path.name for path in paths[1:] if not path.is_file()]
    if missing:
        file.refuse(
            f"{len(missing)} of {count} parts are missing beside it: {', '.join(missing[:3])}",
            at=first.at["split.count"],
            hint="download all parts into one folder",
        )
    parts, size_bytes = [first], file.size
    names = {tensor.name for tensor in first.tensors}
    for index, path in enumerate(paths[1:], start=1):
        part, part_bytes = _read_part(path, index, count)
        twice = next((tensor for tensor in part.tensors if tensor.name in names), None)
        if twice:
            file.refuse(f"the tensor {shown(twice.name)} is in two parts, one of them {path.name}", at=0)
        names.update(tensor.name for tensor in part.tensors)
        parts.append(part)
        size_bytes += part_bytes
    promised = first.metadata.get("split.tensors.count", len(names))
    if promised != len(names):
        file.refuse(f"{promised} tensors are promised, but the {count} parts hold {len(names)}", at=0)
    return parts, size_bytes


def _read_part(path: Path, index: int, count: int) -> tuple[Gguf, int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        file = Bytes(descriptor, path, os.fstat(descriptor).st_size)
        if file.size < 24 or os.pread(descriptor, 4, 0) != b"GGUF":
            file.refuse(f"part {index + 1} of {count} is no GGUF file", at=0)
        gguf = read_gguf(file)
        claimed = (_number(file, gguf, "split.no"), _number(file, gguf, "split.count"))
        if claimed != (index, count):
            file.refuse(
                f"the file says it is part {claimed[0] + 1} of {claimed[1]}; part {index + 1} of {count} is needed",
                at=0,
            )
        return gguf, file.size
    finally:
        os.close(descriptor)
