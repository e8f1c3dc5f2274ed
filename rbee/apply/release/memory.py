"""Remembers what was built from which packages, so that an apply that changes nothing packs nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from rbee.paths import private, write_private
from rbee.plugin import ENTRY_POINT_GROUP

if TYPE_CHECKING:
    from rbee.apply.release import Release

KEPT = 64


def recall(folder: Path, key: str) -> Release | None:
    """Return the release that was built under this key, when all of its layers are still in the cache."""
    from rbee.apply.release import Release

    try:
        found = msgspec.json.decode((folder / "built" / key).read_bytes(), type=Release, dec_hook=_path)
    except (OSError, msgspec.DecodeError):
        return None
    return found if all(layer.path.is_file() for layer in found.layers) else None


def remember(folder: Path, key: str, release: Release) -> None:
    """Keep a release under its key, and the newest of the others."""
    place = private(folder / "built")
    write_private(place / key, msgspec.json.encode(release, enc_hook=str))
    for old in sorted(place.iterdir(), key=lambda file: file.stat().st_mtime)[:-KEPT]:
        old.unlink(missing_ok=True)


def key_of(*parts: object) -> str:
    """Return a key for `parts` and all that is installed here: a package that changed gives another one."""
    digest = hashlib.sha256(repr(parts).encode())
    for line in _installed():
        digest.update(line.encode())
    return digest.hexdigest()


def _installed() -> Iterator[str]:
    """Yield a line for each installed distribution, and for each file of packages that may be edited in place."""
    for entry in sys.path:
        if os.path.isdir(entry):
            for item in sorted(os.scandir(entry), key=lambda item: item.name):
                if item.name.endswith(".dist-info"):
                    yield f"{item.path} {item.stat().st_mtime_ns}\n"
    modules = {point.module.partition(".")[0] for point in entry_points(group=ENTRY_POINT_GROUP)}
    for module in sorted({"rbee", "rhai", *modules}):
        spec = importlib.util.find_spec(module)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            yield from _files(folder)


def _files(folder: str) -> Iterator[str]:
    for item in sorted(os.scandir(folder), key=lambda item: item.name):
        if item.is_dir():
            if item.name != "__pycache__":
                yield from _files(item.path)
        else:
            status = item.stat()
            yield f"{item.path} {status.st_size} {status.st_mtime_ns}\n"


def _path(type_: type[Any], value: Any) -> Any:
    return Path(value) if type_ is Path else value
