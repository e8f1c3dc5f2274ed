"""Which engine a model gets when nobody names one: the same for a worker that a hive starts and one of systemd's."""

from __future__ import annotations

from collections.abc import Iterable

from rbee.errors import PluginProblem
from rbee.wire.fleet import EngineReport

DEFAULT_ENGINE = "xllamacpp"


def first_choice(name: str) -> bool:
    """Return a sort key that puts the default engine before all others."""
    return name != DEFAULT_ENGINE


def default_engine(model: str, format_: str, engines: Iterable[EngineReport]) -> EngineReport:
    """Return the first engine that loads this format and can run here; they come in the order of preference.

    A model without a file belongs to the engine of its name. No engine after the chosen one is looked at, since
    reporting on one imports its plugin. Raises: PluginProblem.
    """
    broken = []
    for engine in engines:
        if format_ not in engine.formats if format_ else engine.name != model:
            continue
        if not engine.problem:
            return engine
        broken.append(f". {engine.name}: {engine.problem}")
    wanted = f"loads {format_} files, as {model!r} is one" if format_ else f"is called {model!r}"
    raise PluginProblem(f"No engine that can run here {wanted}{''.join(broken)}", hint="rbee plugin list")
