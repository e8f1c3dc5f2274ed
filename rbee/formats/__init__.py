"""Reads model files before any engine does, and refuses those that lie.

An engine parses a model file in C++ inside the worker; a file that lies about its own sizes can crash it or worse
(CVE-2026-27940, CVE-2026-7482). `inspect` reads the header only, in Python, within fixed bounds of time and memory.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NoReturn

from rbee.errors import InvalidModelFile
from rbee.formats.foreign import recognise
from rbee.formats.ggml import MAGICS, read_ggml_model
from rbee.formats.gguf import MAGIC
from rbee.formats.gguf_split import read_gguf_model
from rbee.formats.reading import DOWNLOAD_AGAIN, Bytes, LeftOut, ModelFile, printable, shown

__all__ = ["LeftOut", "ModelFile", "inspect"]

_HEAD_BYTES = 64


def inspect(path: Path, *, model_type: str = "") -> ModelFile:
    """Return what the model file at `path` says about itself, once its claims were checked against its bytes.

    `model_type` names the family of an old GGML file (gpt2, gptj, mpt, ...), which often cannot be told from the file;
    without it a `config.json` beside the file is asked. A split GGUF is given by its first part; all parts are read.

    Raises InvalidModelFile, also for a file that is missing, empty or not readable.
    """
    descriptor = _open(path)
    try:
        file = Bytes(descriptor, path, os.fstat(descriptor).st_size)
        head = os.pread(descriptor, _HEAD_BYTES, 0)
        if head.startswith(MAGIC):
            return read_gguf_model(file)
        if head[:4] in MAGICS:
            return read_ggml_model(file, model_type)
        _refuse_foreign(file, head)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open a regular file for reading. O_NONBLOCK: a named pipe must be refused, not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(descriptor)
    except FileNotFoundError:
        raise _problem(path, "there is no such file", "ls -l in its folder; a relative path counts from here") from None
    except PermissionError:
        raise _problem(
            path,
            "this user may not read it",
            f"chmod a+r {printable(path)}, and a+x on its folders",
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no path"
        raise _problem(path, f"it cannot be opened: {reason}", "the path of a model file") from None
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        os.close(descriptor)
        raise _not_a_file(path, status)
    return descriptor


def _not_a_file(path: Path, status: os.stat_result) -> InvalidModelFile:
    if stat.S_ISDIR(status.st_mode):
        models = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".gguf", ".bin"))[:3]
        return _problem(
            path,
            "this is a folder",
            "one file in it: " + ", ".join(models) if models else "the file itself",
        )
    if not stat.S_ISREG(status.st_mode):
        return _problem(path, "this is a device or a pipe, not a file", "the path of a model file")
    return _problem(path, "the file is empty", DOWNLOAD_AGAIN)


def _problem(path: Path, what: str, hint: str) -> InvalidModelFile:
    return InvalidModelFile(f"{printable(path)}: {what}", hint=hint, param="path")


def _refuse_foreign(file: Bytes, head: bytes) -> NoReturn:
    foreign = recognise(head, file.size)
    if foreign is None:
        file.refuse(
            f"this is no model file that rbee knows; it begins with {shown(head[:8])}",
            at=0,
            hint="a GGUF file",
        )
    file.refuse(f"this is {foreign.what}", at=0, hint=foreign.hint)
