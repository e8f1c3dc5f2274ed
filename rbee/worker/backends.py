"""The one reader of backend entry points: what is installed, and why something of it cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points

from rbee.default_engine import first_choice
from rbee.errors import PluginProblem
from rbee.plugin import API_VERSION, ENTRY_POINT_GROUP, AnsweringBackend, Backend, ServingBackend
from rbee.wire.fleet import EngineReport


def report_all() -> list[EngineReport]:
    """Report every installed backend by name; one that is broken says so in `problem`."""
    return [_report(entry) for entry in _entries()]


def reports_by_preference() -> Iterator[EngineReport]:
    """Yield a report on each installed backend, the default one first; none is imported before its turn."""
    for entry in sorted(_entries(), key=lambda entry: first_choice(entry.name)):
        yield _report(entry)


def find(name: str) -> type[Backend]:
    """Return the backend class of this name. Raises: PluginProblem with what is installed, or what is wrong."""
    known = list(_entries())
    for entry in known:
        if entry.name == name:
            backend, problem = _load(entry)
            problem = problem or (_check(backend) if backend else "")
            if backend is None or problem:
                raise PluginProblem(f"The backend {name!r} cannot be used: {problem}", hint="rbee plugin list")
            return backend
    names = ", ".join(sorted({entry.name for entry in known})) or "none"
    raise PluginProblem(f"No backend is called {name!r}; installed: {names}", hint=f"pip install rbee-{name}")


def _entries() -> Iterator[EntryPoint]:
    yield from sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name)


def _load(entry: EntryPoint) -> tuple[type[Backend] | None, str]:
    """Import a backend class. A plugin is another person's code: whatever it raises becomes a text."""
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as problem:  # noqa: BLE001
        return None, f"importing {entry.value} failed: {_one_line(problem)}"
    if not (isinstance(loaded, type) and issubclass(loaded, ServingBackend | AnsweringBackend)):
        return None, f"{entry.value} is no subclass of ServingBackend or AnsweringBackend"
    missing = [name for name in ("name", "summary", "capabilities") if not hasattr(loaded, name)]
    missing += sorted(getattr(loaded, "__abstractmethods__", ()))
    if missing:
        return None, f"{entry.value} lacks {', '.join(missing)}"
    if loaded.api_version != API_VERSION:
        return None, f"{entry.value} is written for plugin API {loaded.api_version}, this rbee has {API_VERSION}"
    return loaded, ""


def _check(backend: type[Backend]) -> str:
    try:
        return backend.check() or ""
    except (Exception, SystemExit) as problem:  # noqa: BLE001
        return f"its check failed: {_one_line(problem)}"


def _version(backend: type[Backend], entry: EntryPoint) -> str:
    try:
        engine = backend.version()
    except (Exception, SystemExit):  # noqa: BLE001  a missing version is no reason to hide an engine
        engine = ""
    return engine or (entry.dist.version if entry.dist else "")


def _report(entry: EntryPoint) -> EngineReport:
    package = entry.dist.name if entry.dist else ""
    backend, problem = _load(entry)
    if backend is None:
        return EngineReport(name=entry.name, package=package, problem=problem)
    problem = _check(backend)
    try:
        return EngineReport(
            name=entry.name,
            package=package,
            version="" if problem else _version(backend, entry),
            summary=str(backend.summary),
            shape="serves" if issubclass(backend, ServingBackend) else "answers",
            capabilities=sorted(map(str, backend.capabilities)),
            features=sorted(map(str, backend.features)),
            formats=sorted(map(str, backend.formats)),
            devices=sorted(map(str, backend.devices)),
            options={str(key): str(value) for key, value in backend.options.items()},
            problem=problem,
        )
    except (TypeError, AttributeError) as wrong:
        problem = f"{entry.value} describes itself wrongly: {wrong}"
        return EngineReport(name=entry.name, package=package, problem=problem)


def _one_line(problem: BaseException) -> str:
    text = " ".join(str(problem).split())[:300]
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__
