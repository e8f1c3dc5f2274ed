"""The routing script: compiled once, followed on disk, and never able to fail a job.

This module is the only one that knows Rhai. A script proposes; what it returns is one of the candidates it was given,
so it cannot send a job anywhere else. A script that does not compile leaves the last good one in force; one that
fails while it runs leaves the decision to the built-in default, and is put aside after three failures in a row.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import rhai

from rbee.errors import InvalidScript, Refused

log = logging.getLogger("rbee.queen.script")

ROUTES = ("route_task", "schedule_job")
"""The entry functions, the current name first; both take the job and the workers."""
ADMITS = "should_admit"
LOOK_EVERY_S = 0.25
FAILURES_ALLOWED = 3
MAX_OPERATIONS = 200_000  # filters over a thousand workers take about 15,000 each
TIMEOUT_S = 0.05

Record = Mapping[str, Any]


def compile_script(source: str, name: str) -> rhai.Script:
    """Compile a routing script. Raises: InvalidScript, with the line and column."""
    try:
        script = _engine().compile(source, name=name)
    except rhai.Error as problem:
        raise InvalidScript(f"The routing script does not compile: {problem}") from None
    if not {function.name for function in script.functions()} & {*ROUTES, ADMITS}:
        raise InvalidScript(
            f"{name} has no function named route_task, schedule_job or should_admit",
            hint="fn route_task(task, workers) { workers.least_loaded() }",
        )
    return script


class RoutingScript:
    """The script in force, and what is wrong with the person's own one if anything is.

    `error` is empty when all is well. The file is looked at no more often than every 250 ms.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error = ""
        self._default = compile_script(_resource("default.rhai"), "default.rhai")
        self._script = self._default
        self._failures = 0
        self._looked_at = float("-inf")
        self._stamp: tuple[int, int, int] | None = None

    @property
    def source(self) -> str:
        """Return where the script in force comes from."""
        return "built-in default" if self._script is self._default else str(self.path)

    def check_admission(self, task: Record, queue_depth: int) -> None:
        """Ask the script whether a job may enter. Raises: Refused."""
        self.follow()
        verdict = self._call(ADMITS, task, queue_depth)
        if verdict is False:
            raise Refused("The routing script does not admit this job at present")
        if isinstance(verdict, Mapping) and "rejected" in verdict:
            raise Refused(str(verdict["rejected"])[:500])

    def rank(self, task: Record, workers: Sequence[Record]) -> list[int]:
        """Return the indices of the chosen workers, the first choice first; empty means: wait."""
        self.follow()
        frozen = _engine().freeze(workers)
        for name in ROUTES:
            if self._has(self._script, name):
                return _indices(self._call(name, task, frozen))
        return _indices(self._default.call(ROUTES[0], task, frozen))

    def reload(self) -> None:
        """Read the file again at once."""
        self._looked_at, self._stamp = float("-inf"), None
        self.follow()

    def _call(self, name: str, *args: Any) -> Any:
        """Call a function of the script, or of the default where it lacks or fails it."""
        if self._script is not self._default and self._has(self._script, name):
            try:
                result = self._script.call(name, *args)
            except rhai.Error as problem:
                self._failed(name, problem)
            else:
                self._failures = 0
                return result
        name = ROUTES[0] if name in ROUTES else name
        return self._default.call(name, *args)

    def _failed(self, name: str, problem: rhai.Error) -> None:
        self._failures += 1
        self.error = f"{self.path}: {name} failed: {problem}"
        if self._failures >= FAILURES_ALLOWED:
            self.error += f". It is not asked again until it is saved anew ({self._failures} failures in a row)"
            self._script = self._default
        log.warning("%s; the built-in default decides", self.error)

    def follow(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        self._failures = 0
        self._load(present=stamp is not None)

    def _load(self, *, present: bool) -> None:
        if not present:
            self._script, self.error = self._default, ""
            return
        try:
            self._script = compile_script(self.path.read_text("utf-8"), str(self.path))
        except (InvalidScript, OSError, UnicodeDecodeError) as problem:
            self.error = f"{problem}. In force: {self.source}"
            log.warning("%s", self.error)
        else:
            self.error = ""
            log.info("routing script %s is in force", self.path)

    @staticmethod
    def _has(script: rhai.Script, name: str) -> bool:
        return any(function.name == name for function in script.functions())


def _engine() -> rhai.Engine:
    global _shared
    if _shared is None:
        _shared = rhai.Engine(prelude=_resource("prelude.rhai"), max_operations=MAX_OPERATIONS, timeout_s=TIMEOUT_S)
    return _shared


_shared: rhai.Engine | None = None


def _resource(name: str) -> str:
    return (files("rbee.queen") / name).read_text("utf-8")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _indices(result: Any) -> list[int]:
    chosen = result if isinstance(result, (list, tuple)) else [result]
    indices = [item.index for item in chosen if isinstance(item, rhai.Record)]
    return list(dict.fromkeys(indices))
