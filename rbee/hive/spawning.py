"""Decides what a spawn request means: which model, which engine, what they can do together. Pure; it starts nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass

from rbee.default_engine import default_engine, first_choice
from rbee.errors import InvalidModelFile, InvalidRequest, NotSupported, PluginProblem, UnknownModel
from rbee.wire.fleet import Device, EngineReport, ModelReport, SpawnWorker

WORKER_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
SLUG_LENGTH = 36
"""Room is left for "-999"."""


@dataclass(frozen=True)
class Spawn:
    """A checked request: the model, its engine, and the capabilities and features that they have together."""

    request: SpawnWorker
    model: ModelReport
    engine: EngineReport
    capabilities: list[str]


def decide(
    request: SpawnWorker,
    models: Sequence[ModelReport],
    engines: Sequence[EngineReport],
    devices: Sequence[Device],
) -> Spawn:
    """Check a request against what this machine has.

    Raises: UnknownModel, InvalidModelFile, PluginProblem, NotSupported, InvalidRequest.
    """
    model = _find_model(request.model, models)
    engine = _find_engine(request.backend, engines) if request.backend else _default_engine(model, engines)
    _check_format(model, engine, engines)
    _check_device(request.device, engine, devices)
    _check_options(request, engine)
    capabilities = [name for name in model.capabilities if name in engine.capabilities]
    if not capabilities:
        able = ", ".join(model.capabilities) or "no kind of work by itself"
        raise NotSupported(
            f"The model {model.name!r} is made for {able}; {engine.name} does {', '.join(engine.capabilities)}",
            param="backend",
        )
    return Spawn(request, model, engine, capabilities)


def engine_models(engines: Sequence[EngineReport]) -> list[ModelReport]:
    """Return a model for each usable engine that needs no file; it has the engine's name."""
    return [
        ModelReport(name=engine.name, capabilities=engine.capabilities, builtin=True)
        for engine in engines
        if not engine.formats and not engine.problem
    ]


def worker_name(wanted: str, model: str, taken: Container[str]) -> str:
    """Return a free worker name: the wanted one, or the model's with a number from 2 up.

    Raises: InvalidRequest when the wanted one is no name, or is taken.
    """
    if wanted:
        if not WORKER_NAME.fullmatch(wanted):
            raise InvalidRequest(f"{wanted!r} is no worker name", hint="at most 40 of a-z, 0-9 and '-'", param="name")
        if wanted in taken:
            raise InvalidRequest(f"A worker named {wanted!r} runs already", hint="another name", param="name")
        return wanted
    slug = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:SLUG_LENGTH].rstrip("-") or "worker"
    number = 1
    while (name := slug if number == 1 else f"{slug}-{number}") in taken:
        number += 1
    return name


def _find_model(name: str, models: Sequence[ModelReport]) -> ModelReport:
    for model in models:
        if model.name == name:
            if model.problem:
                raise InvalidModelFile(f"The model {name!r} cannot be loaded: {model.problem}", param="model")
            return model
    names = [model.name for model in models]
    lowered = {known.lower(): known for known in names}
    near = [lowered[match] for match in difflib.get_close_matches(name.lower()[:200], lowered, n=3)]
    raise UnknownModel(name, near, names)


def _find_engine(name: str, engines: Sequence[EngineReport]) -> EngineReport:
    for engine in engines:
        if engine.name == name:
            if engine.problem:
                raise PluginProblem(f"The engine {name} cannot run here: {engine.problem}", hint="rbee plugin list")
            return engine
    installed = ", ".join(engine.name for engine in engines) or "none"
    words = f"No engine named {name[:100]!r} is installed. Installed: {installed}"
    raise NotSupported(words, hint="rbee plugin list", param="backend")


def _default_engine(model: ModelReport, engines: Sequence[EngineReport]) -> EngineReport:
    """An engine for whoever names none: the default one when it can, else the first that can."""
    if not model.format:
        return _find_engine(model.name, engines)
    preferred = sorted(engines, key=lambda engine: first_choice(engine.name))
    return default_engine(model.name, model.format, preferred)


def _check_format(model: ModelReport, engine: EngineReport, engines: Sequence[EngineReport]) -> None:
    if (model.format in engine.formats) if model.format else (model.name == engine.name):
        return
    what = f"is a {model.format} file" if model.format else "belongs to the engine of its name"
    others = [e.name for e in engines if not e.problem and (model.format in e.formats or model.name == e.name)]
    raise NotSupported(
        f"The model {model.name!r} {what}, which the engine {engine.name} does not load",
        hint=f"the engine {' or '.join(others)}" if others else "install an engine that does: rbee plugin list",
        param="backend",
    )


def _check_device(device: str, engine: EngineReport, devices: Sequence[Device]) -> None:
    here = sorted({d.kind for d in devices})
    if device not in here:
        raise NotSupported(f"This machine has no device {device[:50]!r}; it has: {', '.join(here)}", param="device")
    if device not in engine.devices:
        able = ", ".join(engine.devices)
        raise NotSupported(f"The engine {engine.name} does not run on {device}; it runs on: {able}", param="device")


def _check_options(request: SpawnWorker, engine: EngineReport) -> None:
    for option in request.options:
        if option not in engine.options:
            takes = ", ".join(sorted(engine.options)) or "none"
            shown = option[:50]
            raise InvalidRequest(f"{engine.name} has no option {shown!r}. It takes: {takes}", param=f"options.{shown}")
