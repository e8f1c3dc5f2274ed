"""The models that this machine can load: the files a person listed, and the one in the box."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from rbee.errors import InvalidModelFile, InvalidRequest, NotFound
from rbee.paths import BUILT_IN_FILE, BUILT_IN_MODEL
from rbee.wire.fleet import NAME_PATTERN, AddModel, ModelReport

if TYPE_CHECKING:
    from tinydb import TinyDB

    from rbee.formats import ModelFile

log = logging.getLogger("rbee.hive")


class CatalogEntry(Struct, frozen=True, kw_only=True):
    """One listed file as it was when it was listed. `file_bytes` is the size of the file at `path` alone."""

    name: str
    path: str
    file_bytes: int
    size_bytes: int
    format: str
    architecture: str = ""
    parameters: int = 0
    context_tokens: int = 0
    quantization: str = ""
    capabilities: list[str] = []
    added_at: float = 0.0


class Catalog:
    """The listing, kept in a TinyDB file; model files themselves are read and never changed.

    `reserved` gives the names that are taken by something else: the engines that need no file.
    """

    def __init__(self, path: Path, changed: Callable[[], None], reserved: Callable[[], list[str]] = list) -> None:
        self._path = path
        self._changed = changed
        self._reserved = reserved
        self._lock = threading.Lock()
        self._database: TinyDB | None = None
        self._entries: dict[str, CatalogEntry] = {}
        self._builtin: ModelReport | None = None
        # TinyDB is imported when there is something to read: an empty catalog must not slow the first start.
        if path.exists() or path.with_name(path.name + ".bak").exists():
            self._load(self._open())

    def models(self) -> list[ModelReport]:
        """Return every listed model, the built-in one first; `problem` says why one cannot be loaded at present."""
        with self._lock:
            entries = list(self._entries.values())
        return [self._built_in(), *(_report(entry, _problem(entry)) for entry in entries)]

    def add(self, request: AddModel) -> ModelReport:
        """List a file; the same file again is read again. Raises: InvalidRequest, InvalidModelFile, SetupProblem."""
        path = _resolved(request.path)
        from rbee.formats import inspect

        file = inspect(path)
        reserved = {BUILT_IN_MODEL, *self._reserved()}
        with self._lock:
            name = self._name_for(request.name, path, reserved)
            entry = _entry(name, path, file)
            database = self._open()
            document = msgspec.to_builtins(entry)
            database.table("models").upsert(document, lambda found: found.get("name") == name)
            self._entries[name] = entry
        log.info("model %s is listed: %s", name, path)
        self._changed()
        return _report(entry)

    def remove(self, name: str) -> ModelReport:
        """Take a model off the list; its file stays. Raises: NotFound, InvalidRequest, SetupProblem."""
        if name == BUILT_IN_MODEL or name in self._reserved():
            raise InvalidRequest(f"The model {name!r} is part of rbee and cannot be removed", param="name")
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                known = ", ".join(self._entries) or "none"
                raise NotFound(f"There is no model named {name[:100]!r} on this machine. Listed: {known}", param="name")
            database = self._open()
            database.table("models").remove(lambda found: found.get("name") == name)
            del self._entries[name]
        log.info("model %s is off the list", name)
        self._changed()
        return _report(entry)

    def close(self) -> None:
        """Let another process write."""
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    def _open(self) -> TinyDB:
        if self._database is None:
            from tinydb import TinyDB

            from rbee.hive.storage import AtomicStorage

            self._database = TinyDB(self._path, storage=AtomicStorage)
        return self._database

    def _load(self, database: TinyDB) -> None:
        for document in database.table("models").all():
            try:
                entry = msgspec.convert(dict(document), CatalogEntry)
            except msgspec.ValidationError as problem:
                log.error("%s: an entry is not understood and stays as it is (%s): %s", self._path, problem, document)
            else:
                self._entries[entry.name] = entry

    def _name_for(self, wanted: str, path: Path, reserved: set[str]) -> str:
        """Return the name under which a file is listed. Raises: InvalidRequest when another one has it."""
        if not wanted:
            listed = next((entry.name for entry in self._entries.values() if entry.path == str(path)), None)
            wanted = listed or safe_name(path)
        if not re.fullmatch(NAME_PATTERN, wanted):
            raise InvalidRequest(
                f"{wanted[:100]!r} is no model name", hint="letters, digits, . _ : @ + -", param="name"
            )
        taken = self._entries.get(wanted)
        if taken is not None and taken.path != str(path):
            raise InvalidRequest(f"The name {wanted!r} is taken by {taken.path}", hint="another name", param="name")
        if taken is None and wanted in reserved:
            raise InvalidRequest(f"The name {wanted!r} is taken by rbee's own model", hint="another name", param="name")
        return wanted

    def _built_in(self) -> ModelReport:
        with self._lock:
            if self._builtin is None:
                self._builtin = _inspect_built_in()
            return self._builtin


def _report(entry: CatalogEntry, problem: str = "") -> ModelReport:
    return ModelReport(
        name=entry.name,
        path=entry.path,
        format=entry.format,
        size_bytes=entry.size_bytes,
        architecture=entry.architecture,
        parameters=entry.parameters,
        context_tokens=entry.context_tokens,
        quantization=entry.quantization,
        capabilities=entry.capabilities,
        builtin=entry.name == BUILT_IN_MODEL,
        added_at=entry.added_at,
        problem=problem,
    )


def inspected(name: str, path: Path, file: ModelFile) -> ModelReport:
    """Return the report on a file that was read just now."""
    return _report(_entry(name, path, file))


def safe_name(path: Path) -> str:
    """Return a model name made of a file's: the stem, without what a name cannot hold and without a part number."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
    return re.sub(r"[^A-Za-z0-9._:@+-]+", "-", stem).strip("._:@+-")[:96] or "model"


def _inspect_built_in() -> ModelReport:
    from rbee.formats import inspect

    try:
        return _report(_entry(BUILT_IN_MODEL, BUILT_IN_FILE, inspect(BUILT_IN_FILE)))
    except InvalidModelFile as problem:
        log.error("the built-in model: %s", problem)
        return ModelReport(
            name=BUILT_IN_MODEL, path=str(BUILT_IN_FILE), format="gguf", builtin=True, problem=str(problem)
        )


def _problem(entry: CatalogEntry) -> str:
    """Say why a listed file cannot be loaded at present; it is looked at, not read."""
    try:
        size = os.stat(entry.path).st_size
    except OSError as problem:
        return f"{entry.path} cannot be read ({problem.strerror}); put it back, or: rbee model remove {entry.name}"
    if not os.access(entry.path, os.R_OK):
        return f"{entry.path} may not be read by this user"
    if size != entry.file_bytes:
        return f"{entry.path} has {size} bytes and had {entry.file_bytes} when it was listed; rbee model add it again"
    return ""


def _resolved(given: str) -> Path:
    """Return the absolute path of a regular file. Raises: InvalidRequest, InvalidModelFile."""
    try:
        path = Path(given).expanduser()
    except RuntimeError:
        raise InvalidRequest(f"{given[:200]!r}: there is no such home folder", param="path") from None
    if not path.is_absolute():
        # The folder that a hive was started in is no folder that the caller has in mind.
        raise InvalidRequest(f"{given[:200]!r} is a relative path", hint="the whole path, from / on", param="path")
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as problem:
        raise InvalidRequest(f"{given[:200]!r} is no path of a file ({problem})", param="path") from None


def _entry(name: str, path: Path, file: ModelFile) -> CatalogEntry:
    return CatalogEntry(
        name=name,
        path=str(path),
        file_bytes=os.stat(path).st_size,
        size_bytes=file.size_bytes,
        format=file.format,
        architecture=file.architecture,
        parameters=file.parameters,
        context_tokens=file.context_tokens,
        quantization=file.quantization,
        capabilities=list(file.capabilities),
        added_at=time.time(),
    )
