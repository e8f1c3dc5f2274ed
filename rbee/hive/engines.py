"""Which engines are installed, asked of a child process: a plugin may crash, and one import may take seconds."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import msgspec
from msgspec import Struct

import rbee
from rbee.hive.launch import exit_words
from rbee.paths import private, write_private
from rbee.plugin import ENTRY_POINT_GROUP
from rbee.wire.fleet import EngineReport

log = logging.getLogger("rbee.hive")

LIST_LIMIT_S = 30.0


class EngineCache(Struct, frozen=True, kw_only=True):
    """`engines.json` in the cache folder: what was installed when the engines were listed, and the list."""

    key: list[str]
    engines: list[EngineReport]


class Engines:
    """The installed engines, listed once and again when what is installed changes."""

    def __init__(self, cache: Path, log_path: Path, command: Sequence[str], changed: Callable[[], None]) -> None:
        self._cache = cache
        self._log = log_path
        self._command = (*command, "plugins", "--json")
        self._changed = changed
        self._engines: list[EngineReport] = []
        self._key: list[str] = []
        self._known = threading.Event()
        self._refreshing = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self.problem = ""
        """Why the engines could not be listed the last time."""

    def start(self) -> None:
        """List the engines in the background."""
        threading.Thread(target=self.refresh, name="engines", daemon=True).start()

    def reports(self) -> list[EngineReport]:
        """Return what is known; empty while the first listing runs."""
        return self._engines

    def wait(self, timeout_s: float) -> bool:
        """Wait for the first listing; return whether it is there."""
        return self._known.wait(timeout_s)

    def refresh(self) -> None:
        """List the engines anew unless nothing changed since the last time."""
        with self._refreshing:
            key = installed()
            if self._known.is_set() and key == self._key and not self.problem:
                return
            cached = self._read_cache()
            if cached and cached.key == key:
                self._take(key, cached.engines)
                # What an engine lacks (a library, say) may be there without any package having changed.
                if not any(engine.problem for engine in cached.engines):
                    return
            engines = self._ask()
            if engines is not None:
                self._take(key, engines)
                self._write_cache(EngineCache(key=key, engines=engines))
            self._known.set()

    def is_listing(self) -> bool:
        """Return True while a child process lists the engines."""
        return self._child is not None and self._child.returncode is None

    def stop(self) -> None:
        """End a listing that runs."""
        self._stopping.set()
        child = self._child
        if child is not None:
            child.kill()

    def _take(self, key: list[str], engines: list[EngineReport]) -> None:
        changed = engines != self._engines or not self._known.is_set()
        self._key, self._engines = key, engines
        self._known.set()
        if changed:
            self._changed()

    def _ask(self) -> list[EngineReport] | None:
        with open(private(self._log.parent) / self._log.name, "wb") as errors:
            child = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        self._child = child
        if self._stopping.is_set():
            child.kill()
        try:
            output, _ = child.communicate(timeout=LIST_LIMIT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
        if self._stopping.is_set():
            return None
        try:
            engines = _decode(output)
        except msgspec.DecodeError as problem:
            what = exit_words(child.returncode) if child.returncode else f"no list, {problem}"
            self.problem = f"The engines cannot be listed: {' '.join(self._command)} gave {what}; see {self._log}"
            log.error("%s", self.problem)
            return None
        self.problem = ""
        return engines

    def _read_cache(self) -> EngineCache | None:
        try:
            return msgspec.json.decode(self._cache.read_bytes(), type=EngineCache)
        except (OSError, msgspec.DecodeError):
            return None

    def _write_cache(self, cache: EngineCache) -> None:
        try:
            private(self._cache.parent)
            write_private(self._cache, msgspec.json.encode(cache))
        except OSError as problem:
            log.warning(
                "the list of engines cannot be kept in %s (%s), so each start makes it anew", self._cache, problem
            )


def _decode(output: bytes) -> list[EngineReport]:
    """Read the list; a plugin's import may have printed lines before it."""
    start = output.rfind(b"\n[") + 1
    return msgspec.json.decode(output[start:], type=list[EngineReport])


def installed() -> list[str]:
    """Return what the list of engines depends on, without importing any: rbee, Python, and each plugin's package.

    The time of a plugin's own file is part of it, so that a plugin that is being written is seen as it is.
    """
    points = metadata.entry_points(group=ENTRY_POINT_GROUP)
    found = sorted(f"{point.name} {point.value} {_package(point)} {_modified(point.module)}" for point in points)
    return [f"rbee {rbee.__version__}", f"python {os.path.realpath(sys.executable)} {sys.version}", *found]


def _package(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else ""


def _modified(module: str) -> int:
    with contextlib.suppress(ImportError, OSError, ValueError):
        spec = importlib.util.find_spec(module.partition(".")[0])
        if spec and spec.origin:
            return os.stat(spec.origin).st_mtime_ns
    return 0
