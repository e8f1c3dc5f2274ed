"""Where a job can run: pure decisions over what hives report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rbee.errors import NotSupported, RbeeError
from rbee.inventory.fleet import Host
from rbee.queen.hives import Hive, Worker
from rbee.wire.fleet import EngineReport, ModelReport, WorkerState

ENGINE_ORDER = ("xllamacpp", "llama-cpp-python", "ctransformers")
"""Which engine is taken first for a model that several can load."""

BY_OPTION = {"vision": "a worker with a projector: rbee worker spawn -m MODEL --option mmproj=FILE"}
"""Features that only an option gives a worker, and the hint that says so; workers started for a job have no options."""


@dataclass(frozen=True)
class Candidate:
    """Somewhere a job can run: a worker, or a hive and an engine that can start one."""

    hive: str
    model: ModelReport
    engine: EngineReport
    worker: Worker | None = None
    device: str = "cpu"
    region: str = ""
    tags: tuple[str, ...] = ()
    host: Host | None = None

    @property
    def id(self) -> str:
        """Return the worker's id, or what would be started."""
        return self.worker.id if self.worker else f"{self.hive}/{self.model.name}@{self.engine.name}"


def options(hive: Hive, model: ModelReport) -> list[Candidate]:
    """Return the workers that have a model, and one start for each engine that loads it, the preferred first."""
    engines = {engine.name: engine for engine in hive.report.engines}
    host = hive.host
    region, tags = (host.region, tuple(host.tags)) if host else ("", ())
    found = [
        Candidate(
            hive.report.hive,
            model,
            engines.get(w.report.backend, EngineReport(name=w.report.backend)),
            w,
            w.report.device,
            region,
            tags,
            host,
        )
        for w in hive.workers.values()
        if w.report.model == model.name and w.report.state in (WorkerState.READY, WorkerState.STARTING) and not w.lost
    ]
    if hive.serves is not None:
        return found
    usable = [engine for engine in engines.values() if not engine.problem and _loads(engine, model)]
    device = hive.report.devices[0].kind if hive.report.devices else "cpu"
    found += [
        Candidate(hive.report.hive, model, engine, None, device, region, tags, host)
        for engine in sorted(usable, key=_preference)
    ]
    return [] if model.problem else found


def _loads(engine: EngineReport, model: ModelReport) -> bool:
    return model.format in engine.formats if model.format else model.name == engine.name


def _preference(engine: EngineReport) -> tuple[int, str]:
    place = ENGINE_ORDER.index(engine.name) if engine.name in ENGINE_ORDER else len(ENGINE_ORDER)
    return place, engine.name


def can(candidate: Candidate, capability: str, features: set[str]) -> bool:
    """Return True when a place can do what a job needs."""
    worker = candidate.worker
    if worker and worker.ready:
        return capability in worker.report.capabilities and features <= set(worker.report.features)
    able = set(candidate.engine.capabilities) & set(candidate.model.capabilities or candidate.engine.capabilities)
    found = set(candidate.engine.features)
    return capability in able and features <= (found if worker else found - BY_OPTION.keys())


def cannot(model: str, listed: Iterable[tuple[Hive, ModelReport]], capability: str, features: set[str]) -> RbeeError:
    """Return why none of the places that have a model can do it."""
    problems = [found.problem for _, found in listed if found.problem]
    if problems:
        return NotSupported(f"The model {model!r} cannot be loaded: {problems[0]}", param="model")
    wanted = " with ".join([capability, *sorted(features)])
    able = sorted({c for _, found in listed for c in found.capabilities}) or ["nothing that is known"]
    return NotSupported(
        f"No installed engine can do {wanted} with the model {model!r}, which is made for {', '.join(able)}",
        hint=next((BY_OPTION[feature] for feature in features if feature in BY_OPTION), "rbee plugin list"),
        param="model",
    )
