"""Layers: archives named by what they hold, kept in this machine's cache so that equal content is packed once."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec
from msgspec import Struct

from rbee.apply.release.contents import Item
from rbee.apply.release.elf import Needs, needs

MAGIC = importlib.util.MAGIC_NUMBER.hex()
"""Which interpreters read the compiled modules in a layer; any other ignores them."""
KEPT_S = 30 * 86400
IN_USE_S = 3600
KEPT_BYTES = 4 * 1024**3
UNCHECKED_HASH = (1).to_bytes(4, "little")
FORMAT = 1


class Layer(Struct, frozen=True, kw_only=True):
    """One archive. `sha256` is that of the tar inside, so it names what is unpacked and not how it was packed."""

    name: str
    sha256: str
    packed_bytes: int
    bytes: int
    files: tuple[str, ...]
    machines: tuple[str, ...] = ()
    """What its compiled files are for; empty when it has none."""
    libraries: tuple[str, ...] = ()
    """Shared libraries that its own ask for."""
    glibc: tuple[int, int] = (0, 0)
    path: Path = Path()


class Cache:
    """The folder of packed layers. It may be deleted at any time."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._clock = clock
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def layer(self, name: str, items: Sequence[Item]) -> Layer:
        """Return the layer of these files, packed before or packed at once."""
        listing = "\n".join([f"{FORMAT} {MAGIC} {name}", *(item.fingerprint for item in items)])
        index = self.folder / f"{hashlib.sha256(listing.encode()).hexdigest()}.json"
        known = self._known(index) or self._pack(index, name, items)
        for file in (index, known.path):
            os.utime(file, (self._clock(),) * 2)
        return known

    def _known(self, index: Path) -> Layer | None:
        try:
            known = msgspec.json.decode(index.read_bytes(), type=Layer, dec_hook=lambda kind, value: kind(value))
        except (OSError, msgspec.MsgspecError):
            return None
        path = self.folder / known.path
        if not path.is_file() or path.stat().st_size != known.packed_bytes:
            return None
        return msgspec.structs.replace(known, path=path)

    def _pack(self, index: Path, name: str, items: Sequence[Item]) -> Layer:
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".packing-", delete=False) as file:
            try:
                layer = _written(file, name, items)
                os.replace(file.name, self.folder / layer.path)
            except BaseException:
                os.unlink(file.name)
                raise
        index.write_bytes(msgspec.json.encode(layer, enc_hook=str))
        return msgspec.structs.replace(layer, path=self.folder / layer.path)

    def prune(self) -> None:
        """Delete what was not used for 30 days, and the longest unused beyond 4 GiB, but nothing of the last hour."""
        total, hour_ago = 0, self._clock() - IN_USE_S
        for path, seen in sorted(self._aged(), key=lambda pair: -pair[1].st_mtime):
            total += seen.st_size
            if seen.st_mtime < hour_ago and (total > KEPT_BYTES or seen.st_mtime < self._clock() - KEPT_S):
                path.unlink(missing_ok=True)

    def _aged(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.iterdir():
            if path.is_file():
                yield path, path.stat()


def _written(file: IO[bytes], name: str, items: Sequence[Item]) -> Layer:
    """Write a tar.gz whose bytes depend on the files' names and contents alone."""
    zipped = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0)
    hashing = _Hashing(zipped)
    files: list[str] = []
    asked: list[Needs] = []
    with tarfile.open(fileobj=hashing, mode="w|", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        for item, data in _with_compiled(sorted(items, key=lambda item: item.name)):
            member = tarfile.TarInfo(item.name)
            member.size, member.mode = len(data), 0o755 if item.executable else 0o644
            archive.addfile(member, io.BytesIO(data))
            files.append(item.name)
            asked.append(needs(data) if ".so" in item.name else Needs())
    zipped.close()
    file.flush()
    return Layer(
        name=name,
        sha256=hashing.sha256.hexdigest(),
        packed_bytes=file.tell(),
        bytes=hashing.bytes,
        files=tuple(files),
        machines=tuple(sorted({one.machine for one in asked} - {""})),
        libraries=tuple(sorted({library for one in asked for library in one.libraries})),
        glibc=max((one.glibc for one in asked), default=(0, 0)),
        path=Path(f"{hashing.sha256.hexdigest()}.tar.gz"),
    )


class _Hashing:
    """A file to write to that passes everything on, and counts and hashes it."""

    def __init__(self, inner: gzip.GzipFile) -> None:
        self._inner = inner
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.bytes += len(data)
        self.sha256.update(data)
        return self._inner.write(data)


def _with_compiled(items: Sequence[Item]) -> Iterator[tuple[Item, bytes]]:
    """Yield each file with its bytes, and after a module its compiled form: services may not write into a release."""
    modules = [item for item in items if item.name.endswith(".py")]
    with tempfile.TemporaryDirectory(prefix="rbee-pyc-") as name:
        folder = Path(name)
        _compile(modules, folder)
        for item in items:
            # A module is read once: an edit between two readings would leave it beside the compiled form of another.
            data = (folder / item.name).read_bytes() if item.name.endswith(".py") else item.read()
            yield item, data
            if item.name.endswith(".py"):
                compiled = importlib.util.cache_from_source(item.name)
                found = _received(item, data) or _content(folder / compiled)
                if found is not None:
                    yield Item(compiled), found


def _received(item: Item, data: bytes) -> bytes | None:
    """Return the compiled form that came with a release: compiling anew here may give other bytes (PEP 552)."""
    compiled = _content(Path(importlib.util.cache_from_source(str(item.path)))) if item.path else None
    header = importlib.util.MAGIC_NUMBER + UNCHECKED_HASH + importlib.util.source_hash(data)
    return compiled if compiled and compiled.startswith(header) else None


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _compile(modules: Iterable[Item], folder: Path) -> None:
    """Compile modules below a folder, in an interpreter of their own.

    What marshal writes depends on which strings the process holds already, and equal input must give equal bytes.
    Templates and files for another version of Python do not compile; they are sent as they are.
    """
    for item in modules:
        path = folder / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.read())
    # An import puts the real path in place of the stripped one, so that the layer may lie anywhere.
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-m", "compileall", "-qq", "-s", str(folder)]
    subprocess.run([*command, "--invalidation-mode", "unchecked-hash", str(folder)], check=False, capture_output=True)
