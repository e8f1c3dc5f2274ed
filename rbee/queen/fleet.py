"""What the queen believes of its hives, models and workers; the hives' reports are the only source."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from gevent.event import Event

from rbee import paths
from rbee.client import Client
from rbee.errors import NotFound, NotSupported, RbeeError, UnknownModel
from rbee.http.upstream import Upstream
from rbee.wire.fleet import EngineReport, HiveReport, HiveView, ModelReport, WorkerAccess, WorkerReport, WorkerState

HEARTBEAT_S = 30.0
LOST_AFTER_S = 3 * HEARTBEAT_S
SETTLE_S = 30.0
"""How long a hive that has just been met may take to list its engines."""
ENGINE_ORDER = ("xllamacpp", "llama-cpp-python", "ctransformers")
"""Which engine is taken first for a model that several can load."""

BY_OPTION = {"vision": "a worker with a projector: rbee worker spawn -m MODEL --option mmproj=FILE"}
"""Features that only an option gives a worker, and the hint that says so; workers started for a job have no options."""

DIRECT_PATHS = frozenset({"/v1/embeddings", "/v1/rerank", "/v1/messages/count_tokens"})
"""Endpoints whose whole answers need nothing of the worker's front."""


@dataclass
class Worker:
    """A worker that reported itself, and the queen's own count of what it is doing."""

    hive: str
    report: WorkerReport
    front: Upstream
    engine: Upstream
    in_flight: int = 0
    lost: bool = False
    ttft_ms: float = 0.0

    @property
    def id(self) -> str:
        """Return `hive/name`, unique in the fleet."""
        return f"{self.hive}/{self.report.name}"

    @property
    def ready(self) -> bool:
        """Return True when it takes jobs."""
        return self.report.state is WorkerState.READY and not self.lost

    def upstream(self, path: str, *, stream: bool) -> Upstream:
        """Return the shortest way to an answer that has its API's shape and is cancelled when its client leaves.

        A stream comes from the engine as it is; whole answers, and the events of `/v1/responses`, are completed by
        the worker's front, which also frees a slot at once where an engine would finish the answer for nobody.
        """
        direct = path in DIRECT_PATHS or (stream and path != "/v1/responses")
        return self.engine if direct else self.front


@dataclass(frozen=True)
class Candidate:
    """Somewhere a job can run: a worker, or a hive and an engine that can start one."""

    hive: str
    model: ModelReport
    engine: EngineReport
    worker: Worker | None = None
    device: str = "cpu"

    @property
    def id(self) -> str:
        """Return the worker's id, or what would be started."""
        return self.worker.id if self.worker else f"{self.hive}/{self.model.name}@{self.engine.name}"


@dataclass
class Hive:
    """One hive: its last report, when it came, and how to reach it."""

    report: HiveReport
    client: Client
    seen_at: float
    workers: dict[str, Worker] = field(default_factory=dict)

    @property
    def lost(self) -> bool:
        """Return True when its heartbeats have stopped."""
        return time.monotonic() - self.seen_at > LOST_AFTER_S


class Fleet:
    """The belief. `changed` is set and renewed at every report, so that those who wait can look again."""

    def __init__(self, path: Path, hive_token: str, *, expects_hive: bool = False) -> None:
        self.hives: dict[str, Hive] = {}
        self.changed = Event()
        self._expects_hive = expects_hive
        self._settles_by = time.monotonic() + SETTLE_S
        self._path = path
        self._token = hive_token

    @property
    def settled(self) -> bool:
        """Return False while a hive that has just started is still finding out what it has."""
        if time.monotonic() > self._settles_by:
            return True
        return all(hive.report.engines for hive in self.hives.values()) and bool(self.hives or not self._expects_hive)

    def learn(self, report: HiveReport) -> None:
        """Take a hive's report as the truth, unless a newer one was taken already."""
        hive = self.hives.get(report.hive)
        if hive and (report.epoch, report.sequence) < (hive.report.epoch, hive.report.sequence):
            return
        if hive is None or hive.report.url != report.url:
            hive = Hive(report, Client(report.url, token=self._token), 0.0)
            self.hives[report.hive] = hive
            self._settles_by = time.monotonic() + SETTLE_S
            self._remember()
        hive.report, hive.seen_at = report, time.monotonic()
        hive.workers = dict(self._workers(report, hive.workers))
        self._announce()

    def learn_worker(self, hive_name: str, report: WorkerReport) -> None:
        """Take one worker's state at once, ahead of its hive's next report."""
        hive = self.hives.get(hive_name)
        if hive is None:
            return
        others = [worker for worker in hive.report.workers if worker.name != report.name]
        hive.report = msgspec.structs.replace(hive.report, workers=[*others, report])
        hive.workers = dict(self._workers(hive.report, hive.workers))
        self._announce()

    def forget_unreachable(self, name: str) -> None:
        """Drop a hive that does not answer, so that nothing is sent to it until it reports again."""
        if self.hives.pop(name, None):
            self._announce()

    def recall(self) -> None:
        """Ask the hives that an earlier server process knew for their state."""
        try:
            urls = msgspec.json.decode(self._path.read_bytes(), type=dict[str, str])
        except (OSError, msgspec.DecodeError):
            return
        for name, url in urls.items():
            try:
                report = Client(url, token=self._token, timeout_s=2.0).get("/v1/hive", HiveReport)
            except RbeeError:
                continue
            if report.hive == name:
                self.learn(report)

    def hive(self, name: str) -> Hive:
        """Return the hive of this name. Raises: NotFound."""
        try:
            return self.hives[name]
        except KeyError:
            raise NotFound(f"There is no hive {name!r}; known: {', '.join(sorted(self.hives)) or 'none'}") from None

    def models(self) -> dict[str, ModelReport]:
        """Return every model that some hive has, by name."""
        return {model.name: model for hive in self.hives.values() for model in hive.report.models}

    def candidates(self, model: str, capability: str, features: set[str], wish: str | None) -> list[Candidate]:
        """Return where a job can run: the workers that have the model, else the hives that could start one.

        Raises: UnknownModel; NotSupported when the model is there but nothing can do this with it.
        """
        hives = [self.hive(wish)] if wish else list(self.hives.values())
        listed = [(hive, found) for hive in hives for found in hive.report.models if found.name == model]
        if not listed:
            names = sorted(self.models())
            raise UnknownModel(model, difflib.get_close_matches(model, names, n=3, cutoff=0.5), names)
        able = [c for hive, found in listed for c in _options(hive, found) if _can(c, capability, features)]
        if not able:
            raise _cannot(model, listed, capability, features)
        running = [candidate for candidate in able if candidate.worker]
        return running or able

    def views(self) -> list[HiveView]:
        """Return the belief as it may be shown: without tokens."""
        return [_view(hive) for _, hive in sorted(self.hives.items())]

    def _workers(self, report: HiveReport, known: dict[str, Worker]) -> Iterator[tuple[str, Worker]]:
        for told in report.workers:
            access = told.access or WorkerAccess(url="")
            worker = known.get(told.name)
            if worker is None or worker.report.started_at != told.started_at or worker.report.access != told.access:
                front = Upstream(access.url, token=access.token)
                engine = Upstream(access.engine_url, token=access.token) if access.engine_url else front
                yield told.name, Worker(report.hive, told, front, engine)
            else:
                worker.report = told
                yield told.name, worker

    def _announce(self) -> None:
        changed, self.changed = self.changed, Event()
        changed.set()

    def _remember(self) -> None:
        urls = {name: hive.report.url for name, hive in self.hives.items()}
        paths.write_private(self._path, msgspec.json.encode(urls))


def _options(hive: Hive, model: ModelReport) -> list[Candidate]:
    """Return the workers that have a model, and one start for each engine that loads it, the preferred first."""
    engines = {engine.name: engine for engine in hive.report.engines}
    options = [
        Candidate(
            hive.report.hive,
            model,
            engines.get(w.report.backend, EngineReport(name=w.report.backend)),
            w,
            w.report.device,
        )
        for w in hive.workers.values()
        if w.report.model == model.name and w.report.state in (WorkerState.READY, WorkerState.STARTING) and not w.lost
    ]
    usable = [engine for engine in engines.values() if not engine.problem and _loads(engine, model)]
    device = hive.report.devices[0].kind if hive.report.devices else "cpu"
    options += [Candidate(hive.report.hive, model, engine, None, device) for engine in sorted(usable, key=_preference)]
    return [] if model.problem else options


def _loads(engine: EngineReport, model: ModelReport) -> bool:
    return model.format in engine.formats if model.format else model.name == engine.name


def _preference(engine: EngineReport) -> tuple[int, str]:
    place = ENGINE_ORDER.index(engine.name) if engine.name in ENGINE_ORDER else len(ENGINE_ORDER)
    return place, engine.name


def _can(candidate: Candidate, capability: str, features: set[str]) -> bool:
    worker = candidate.worker
    if worker and worker.ready:
        return capability in worker.report.capabilities and features <= set(worker.report.features)
    able = set(candidate.engine.capabilities) & set(candidate.model.capabilities or candidate.engine.capabilities)
    found = set(candidate.engine.features)
    return capability in able and features <= (found if worker else found - BY_OPTION.keys())


def _cannot(model: str, listed: Iterable[tuple[Hive, ModelReport]], capability: str, features: set[str]) -> RbeeError:
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


def _view(hive: Hive) -> HiveView:
    report = hive.report
    return HiveView(
        hive=report.hive,
        url=report.url,
        version=report.version,
        state="lost" if hive.lost else "ready",
        last_report_s=round(time.monotonic() - hive.seen_at, 3),
        devices=report.devices,
        engines=report.engines,
        models=report.models,
        workers=[msgspec.structs.replace(worker, access=None) for worker in report.workers],
    )
