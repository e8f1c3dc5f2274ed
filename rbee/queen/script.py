"""The routing script: compiled once, followed on disk, and never able to fail a job.

This module is the only one that knows Rhai. A script proposes; what it returns is one of the places it was given,
so it cannot send a job anywhere else. A script that does not compile leaves the last good one in force; one that
fails while it runs leaves the decision to the built-in default, and is put aside after three failures in a row.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import rhai

from rbee.errors import InvalidScript, Refused
from rbee.logs import escaped
from rbee.queen.counting import Distributions

log = logging.getLogger("rbee.queen.script")

ROUTES = ("route_task", "schedule_job")
"""The entry functions, the current name first; both take the job and the workers."""
ADMITS = "should_admit"
LOOK_EVERY_S = 0.25
FAILURES_ALLOWED = 3
MAX_OPERATIONS = 200_000  # filters over a thousand workers take about 15,000 each
TIMEOUT_S = 0.05
MAX_SOURCE_BYTES = 65_536
MAX_ERROR_CHARS = 2000
PREFIX_WORDS = ("prefix_match", "best_prefix")
DEFAULT = "built-in default"
SECONDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)

Record = Mapping[str, Any]
Frozen = rhai.Frozen
FrozenRecord = rhai.Record


class Decision(NamedTuple):
    """What a script decided: places by their index, the first choice first; none means: wait.

    `by` names the script that decided; `problem` says why the person's own did not.
    """

    indices: list[int]
    by: str
    problem: str = ""


@dataclass(frozen=True)
class Explanation:
    """How a script came to its decision. `line` is the line that decided, `lines` those that ran, in their order."""

    decision: Decision
    function: str
    line: int
    code: str
    lines: list[int] = field(default_factory=list)


def freeze(records: Iterable[Record]) -> Frozen:
    """Make records ready for scripts; those that are frozen already are shared."""
    return rhai.freeze(list(records))


@dataclass(frozen=True)
class Compiled:
    """A script that compiles and has an entry function."""

    name: str
    text: str
    script: rhai.Script
    functions: frozenset[str]

    @cached_property
    def route(self) -> str:
        """Return the name of its routing function, or nothing."""
        return next((name for name in ROUTES if name in self.functions), "")

    @cached_property
    def reads_prefixes(self) -> bool:
        """Return True when it may look at what workers have cached."""
        return any(word in self.text for word in PREFIX_WORDS)

    def line(self, number: int) -> str:
        """Return one line of its text without indentation; lines are counted from 1."""
        lines = self.text.splitlines()
        return lines[number - 1].strip() if 0 < number <= len(lines) else ""


def compile_script(source: str, name: str) -> Compiled:
    """Compile a routing script. Raises: InvalidScript, with the line and column."""
    try:
        script = _engine().compile(source, name=name)
    except rhai.Error as problem:
        raise InvalidScript(f"The routing script does not compile: {_words(problem)}") from None
    functions = frozenset(function.name for function in script.functions())
    if not functions & {*ROUTES, ADMITS}:
        raise InvalidScript(
            f"{name} has no function named route_task, schedule_job or should_admit",
            hint="fn route_task(task, workers) { workers.least_loaded() }",
        )
    _check_parameters(script, name)
    return Compiled(name, source, script, functions)


def read_script(path: Path) -> Compiled:
    """Read and compile a file. Raises: InvalidScript."""
    try:
        if path.stat().st_size > MAX_SOURCE_BYTES:
            raise InvalidScript(f"{path} is larger than {MAX_SOURCE_BYTES} bytes")
        return compile_script(path.read_text("utf-8"), str(path))
    except OSError as problem:
        raise InvalidScript(f"{path} cannot be read ({problem.strerror})") from None
    except UnicodeDecodeError:
        raise InvalidScript(f"{path} is not UTF-8 text") from None


def default_script() -> Compiled:
    """Return the script that decides where the person has none."""
    return compile_script(_resource("default.rhai"), DEFAULT)


def decide(compiled: Compiled, task: Record, workers: Frozen) -> list[int]:
    """Return the places that a script chooses. Raises: InvalidScript when it fails or returns something else."""
    try:
        return _indices(compiled.script.call(compiled.route, task, workers), len(workers))
    except rhai.Error as problem:
        raise InvalidScript(f"{compiled.name}: {compiled.route} failed: {_words(problem)}") from None
    except InvalidScript as problem:
        raise InvalidScript(f"{compiled.name}: {compiled.route} {problem.message}") from None


def admits(compiled: Compiled, task: Record, queue_depth: int) -> None:
    """Ask a script that has `should_admit`. Raises: Refused; InvalidScript when it fails or answers something else."""
    try:
        verdict = compiled.script.call(ADMITS, task, queue_depth)
    except rhai.Error as problem:
        raise InvalidScript(f"{compiled.name}: {ADMITS} failed: {_words(problem)}") from None
    if verdict is True:
        return
    if verdict is False:
        raise Refused("The routing script does not admit this job at present")
    if isinstance(verdict, Mapping) and "rejected" in verdict:
        raise Refused(str(verdict["rejected"])[:500])
    raise InvalidScript(
        f"{compiled.name}: {ADMITS} returned {_kind(verdict)}; it must be a bool, admit() or reject(why)"
    )


class RoutingScript:
    """The script in force, and what is wrong with the person's own one if anything is.

    `error` is empty when all is well. The file is looked at no more often than every 250 ms. With `memory`, a file,
    the last good script outlives this process.
    """

    def __init__(self, path: Path, memory: Path | None = None) -> None:
        self.path = path
        self.error = ""
        self.since = time.time()
        self._memory = memory
        self._default = default_script()
        self._own: Compiled | None = None
        self.errors = 0
        """How often a script failed or did not compile."""
        self.times = Distributions("rbee_script_decision_seconds", "How long a routing decision took.", (), SECONDS)
        self._failures = 0
        self._looked_at = float("-inf")
        self._stamp: tuple[int, int, int] | None = None

    @property
    def in_force(self) -> Compiled:
        """Return the script that is asked first."""
        return self._own or self._default

    @property
    def source(self) -> str:
        """Return where the script in force comes from."""
        return self.in_force.name

    @property
    def reads_prefixes(self) -> bool:
        """Return True when the script in force may look at what workers have cached."""
        return self._own is not None and self._own.reads_prefixes

    def check_admission(self, task: Record, queue_depth: int) -> None:
        """Ask the script whether a job may enter. Raises: Refused."""
        self.follow()
        own = self._own
        if own is None or ADMITS not in own.functions:
            return
        try:
            admits(own, task, queue_depth)
        except InvalidScript as problem:
            self._failed(problem.message)

    def rank(self, task: Record, workers: Sequence[Record]) -> list[int]:
        """Return the indices of the chosen workers, the first choice first; empty means: wait."""
        return self.decide(task, freeze(workers)).indices

    def decide(self, task: Record, workers: Frozen) -> Decision:
        """Ask the script in force, and the built-in one when that has no answer; this never fails."""
        self.follow()
        own = self._own
        problem = ""
        if own is not None and own.route:
            try:
                indices = decide(own, task, workers)
            except InvalidScript as found:
                problem = found.message
                self._failed(problem)
            else:
                self._failures = 0
                return Decision(indices, own.name)
        return Decision(decide(self._default, task, workers), DEFAULT, problem)

    def explain(self, task: Record, workers: Frozen) -> Explanation:
        """Decide as `decide` does, and tell which line did; failures do not count against the script."""
        self.follow()
        own = self._own
        problem = ""
        if own is not None and own.route:
            try:
                return explain(own, task, workers)
            except InvalidScript as found:
                problem = found.message
        told = explain(self._default, task, workers)
        return Explanation(told.decision._replace(problem=problem), told.function, told.line, told.code, told.lines)

    def reload(self) -> None:
        """Read the file again at once."""
        self._looked_at, self._stamp = float("-inf"), None
        self.follow()

    def _failed(self, problem: str) -> None:
        self.errors += 1
        self._failures += 1
        if self._failures >= FAILURES_ALLOWED:
            problem += f". It is not asked again until it is saved anew ({self._failures} failures in a row)"
            self._own = None
        if problem != self.error:
            log.warning("%s; the built-in default decides", problem)
        self.error = problem

    def follow(self) -> None:
        """Take up what was saved since the last look."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        first, self._looked_at = self._looked_at < 0, now
        stamp = _stamp(self.path)
        if stamp == self._stamp and not first:
            return
        self._stamp = stamp
        self._failures = 0
        self._load(present=stamp is not None)

    def _load(self, *, present: bool) -> None:
        if not present:
            self._take(None)
            return
        try:
            own = read_script(self.path)
        except InvalidScript as problem:
            self.errors += 1
            self._own = self._own or self._recalled()
            self.error = f"{problem}. In force: {self.source}"
            log.warning("%s", self.error)
        else:
            self._take(own)
            self._remember(own)
            log.info("routing script %s is in force", self.path)

    def _take(self, own: Compiled | None) -> None:
        self._own, self.error, self.since = own, "", time.time()

    def _remember(self, own: Compiled) -> None:
        """Keep a copy for the next process. It is of use, not of need: a full disk must not keep a script out."""
        if self._memory is None:
            return
        beside = self._memory.with_name(f".{self._memory.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            beside.write_text(own.text, "utf-8")
            beside.replace(self._memory)

    def _recalled(self) -> Compiled | None:
        if self._memory is None or not self._memory.exists():
            return None
        try:
            return compile_script(self._memory.read_text("utf-8"), f"{self.path} (last good)")
        except (InvalidScript, OSError, UnicodeDecodeError):
            return None


def explain(compiled: Compiled, task: Record, workers: Frozen) -> Explanation:
    """Decide with a trace. Raises: InvalidScript."""
    try:
        result, lines = compiled.script.trace(compiled.route, task, workers)
        indices = _indices(result, len(workers))
    except rhai.Error as problem:
        raise InvalidScript(f"{compiled.name}: {compiled.route} failed: {_words(problem)}") from None
    except InvalidScript as problem:
        raise InvalidScript(f"{compiled.name}: {compiled.route} {problem.message}") from None
    line = lines[-1] if lines else 0
    return Explanation(Decision(indices, compiled.name), compiled.route, line, compiled.line(line), lines)


def _engine() -> rhai.Engine:
    global _shared
    if _shared is None:
        _shared = rhai.Engine(
            prelude=_resource("prelude.rhai"),
            max_operations=MAX_OPERATIONS,
            timeout_s=TIMEOUT_S,
            max_source_bytes=MAX_SOURCE_BYTES,
        )
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


def _check_parameters(script: rhai.Script, name: str) -> None:
    """Refuse an entry function that can never be called. Raises: InvalidScript."""
    counts: dict[str, set[int]] = {}
    for function in script.functions():
        counts.setdefault(function.name, set()).add(len(function.params))
    for entry in {*ROUTES, ADMITS} & counts.keys():
        if 2 not in counts[entry]:
            second = "queue_depth" if entry == ADMITS else "workers"
            raise InvalidScript(f"{name}: {entry} must take two parameters: fn {entry}(task, {second})")


def _indices(result: Any, count: int) -> list[int]:
    """Return what a script chose as indices. Raises: InvalidScript for anything that is none of its places."""
    if result is None:
        return []
    chosen = result if isinstance(result, (list, tuple)) else [result]
    found = []
    for item in chosen:
        if not isinstance(item, rhai.Record) or item.index >= count:
            raise InvalidScript(f"returned {_kind(item)}, which is none of the workers that it was given")
        found.append(item.index)
    return list(dict.fromkeys(found))


def _words(problem: rhai.Error) -> str:
    """Return what went wrong in one line that no terminal obeys: scripts choose the words that they throw."""
    return escaped(str(problem)[:MAX_ERROR_CHARS])


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value[:80]!r}"
    if isinstance(value, Mapping):
        return "a map"
    return "nothing" if value is None else f"{str(value)[:80]!r}"
