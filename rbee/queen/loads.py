"""Start workers: one start for all the jobs that want it, and it outlives the job that asked first."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import gevent
from gevent.event import Event

from rbee.errors import LoadFailed, NotFound, RbeeError, TimedOut, Unreachable
from rbee.queen.counting import Distributions, outcome_of
from rbee.queen.fleet import SAME_START_S, Fleet
from rbee.queen.hives import Hive, Worker
from rbee.queen.job import LOADING, Job
from rbee.queen.places import Candidate
from rbee.wire.fleet import SpawnWorker, WorkerReport, WorkerState

log = logging.getLogger("rbee.queen.loads")

LOOK_EVERY_S = 5.0
SECONDS = (0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
USEFUL = (WorkerState.STARTING, WorkerState.READY)

Starting = Callable[[str], AbstractContextManager[bool]]
"""Keeps other processes from starting the same meanwhile; its value is False when another has just done so."""


def alone(place: str) -> AbstractContextManager[bool]:
    """Start without asking: there is no other process."""
    return nullcontext(True)


@dataclass
class Load:
    """One start of a worker; `done` is set when it is ready or has failed."""

    done: Event = field(default_factory=Event)
    worker: Worker | None = None
    problem: RbeeError | None = None


class Loads:
    """The starts under way, by what is started."""

    def __init__(self, fleet: Fleet, *, timeout_s: float, starting: Starting = alone) -> None:
        self._fleet = fleet
        self._starting = starting
        self._timeout_s = timeout_s
        self._under_way: dict[str, Load] = {}
        self.times = Distributions(
            "rbee_model_load_seconds",
            "From the start of a worker for a job until it was ready, or failed.",
            ("model", "outcome"),
            SECONDS,
        )

    def wait(self, job: Job, candidate: Candidate) -> Worker:
        """Return the ready worker of a place, starting it when nobody does already.

        Raises: LoadFailed, TimedOut, Unreachable, ClientGone.
        """
        job.enter(LOADING)
        load = self._under_way.get(candidate.id)
        if load is None:
            load = self._under_way[candidate.id] = Load()
            gevent.spawn(self._run, load, candidate)
        gevent.wait([load.done, job.client.gone], count=1)
        job.client.check()
        if load.problem:
            raise load.problem
        assert load.worker is not None
        return load.worker

    def _run(self, load: Load, candidate: Candidate) -> None:
        began = time.monotonic()
        try:
            load.worker = self._start(candidate)
        except RbeeError as problem:
            load.problem = problem
        except Exception as problem:
            log.exception("starting %s", candidate.id)
            load.problem = LoadFailed(f"{candidate.id} could not be started ({problem})")
        finally:
            del self._under_way[candidate.id]
            self.times[candidate.model.name, outcome_of(load.problem)].observe(time.monotonic() - began)
            load.done.set()

    def _start(self, candidate: Candidate) -> Worker:
        hive = self._fleet.hive(candidate.hive)
        if candidate.worker is not None:
            return self._until_ready(candidate.hive, candidate.worker.report)
        with self._starting(candidate.id) as first:
            started = None if first else self._started_elsewhere(candidate)
            if started is None:
                wanted = SpawnWorker(model=candidate.model.name, backend=candidate.engine.name, device=candidate.device)
                started = hive.client.post("/v1/workers", wanted, WorkerReport)
                log.info("%s starts %s with %s", candidate.hive, candidate.model.name, candidate.engine.name)
        return self._until_ready(candidate.hive, started)

    def _started_elsewhere(self, candidate: Candidate) -> WorkerReport | None:
        """Return the worker that another process has started meanwhile, if it is still of use."""
        self._look(candidate.hive)
        reports = [worker.report for worker in self._hive(candidate.hive).workers.values()]
        return next((one for one in reports if one.model == candidate.model.name and one.state in USEFUL), None)

    def _until_ready(self, hive_name: str, started: WorkerReport) -> Worker:
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            changed = self._fleet.changed
            worker = self._hive(hive_name).workers.get(started.name)
            # What is known may be an earlier worker of this name, until the hive reports this one.
            if worker is not None and worker.report.started_at > started.started_at - SAME_START_S:
                if worker.ready:
                    return worker
                if worker.report.state in (WorkerState.FAILED, WorkerState.STOPPED):
                    raise LoadFailed(f"{worker.id} did not start: {worker.report.reason or worker.report.state}")
            if not changed.wait(LOOK_EVERY_S):
                self._look(hive_name)
        raise TimedOut(f"{hive_name}/{started.name} was not ready within {self._timeout_s:g} s")

    def _hive(self, name: str) -> Hive:
        """Return a hive, which may have gone or left the inventory since it began to load. Raises: Unreachable."""
        try:
            hive = self._fleet.hive(name)
        except NotFound as problem:
            raise Unreachable(problem.message) from None
        if hive.away:
            raise Unreachable(f"The hive {name} went away while it loaded a model")
        return hive

    def _look(self, hive_name: str) -> None:
        """Ask a hive that has been silent; a report may have been lost."""
        self._fleet.look(hive_name)
