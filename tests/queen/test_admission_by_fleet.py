"""Admission over a fleet that loads, gets ready and goes away: how many may run, and what the others are told."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gevent
import pytest

from rbee.client import Client
from rbee.errors import Busy, Forbidden, QueueFull, RateLimited
from rbee.http.upstream import Upstream
from rbee.inventory.fleet import At, Host, WorkerLine
from rbee.queen.access import Caller
from rbee.queen.admission import Admission, Place
from rbee.queen.capacity import Capacity
from rbee.queen.client_watch import ClientGone, ClientWatch
from rbee.queen.fleet import Fleet
from rbee.queen.hives import Hive, Worker
from rbee.queen.job import Job
from rbee.queen.keys import INFERENCE
from rbee.queen.metrics import Metrics
from rbee.queen.policy import NO_LIMITS, Policy
from rbee.queen.queueing import UNBOUNDED
from rbee.queen.script import RoutingScript
from rbee.wire.fleet import HiveReport, ModelReport, WorkerReport, WorkerState
from rbee.wire.openai import decode

CHAT = "/v1/chat/completions"
HANG_GUARD_S = 20.0
HERE = At("fleet.conf", 1)


@dataclass
class House:
    """One hive with one model, and who is let in."""

    folder: Path
    queue_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        self.fleet = Fleet(self.folder / "fleet.json", "")
        self.metrics = Metrics(self.fleet)
        self.capacity = Capacity(self.fleet)
        script = RoutingScript(self.folder / "scheduler.rhai")
        self.admission = Admission(
            100, script, self.metrics, self.capacity, queue_limit=1, queue_timeout_s=self.queue_timeout_s
        )
        self._sequence = itertools.count()

    def report(self, state: WorkerState | None = None, slots: int = 1, progress: float = 0.0) -> None:
        shape: dict[str, Any] = {"name": "w", "model": "m", "backend": "echo"}
        workers = [WorkerReport(**shape, state=state, slots=slots, progress=progress)] if state else []
        self.fleet.learn(
            HiveReport(
                hive="h",
                url="unix:/nowhere",
                version="",
                epoch=1.0,
                sequence=next(self._sequence),
                models=[ModelReport(name="m")],
                workers=workers,
            )
        )

    def job(self, policy: Policy = NO_LIMITS) -> Job:
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 400}]}).encode()
        caller = Caller("k", "k", frozenset({INFERENCE}), policy)
        return Job(CHAT, decode(CHAT, body), body, caller, ClientWatch(None))

    def waiting(self, job: Job) -> gevent.Greenlet[[Job], Place]:
        waits: gevent.Greenlet[[Job], Place] = gevent.spawn(self.admission.admit, job)
        gevent.sleep(0)
        assert job.queued
        return waits


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_one_job_asks_for_a_model_that_loads_and_the_rest_are_told_how_far_it_is(house: House) -> None:
    house.report(WorkerState.STARTING, progress=0.63)
    first = house.admission.admit(house.job())
    second = house.job()
    waits = house.waiting(second)
    assert house.admission.status(second) == {"model": "m", "state": "loading", "waiting": 1, "progress": 0.63}
    with pytest.raises(QueueFull, match=r"loading \(63%\)") as full:
        house.admission.admit(house.job())
    assert full.value.retry_after_s >= 1
    assert house.admission.in_flight == 2
    house.report(WorkerState.READY, slots=2)
    waits.get(timeout=HANG_GUARD_S).leave()
    first.leave()
    assert house.admission.in_flight == 0
    assert house.admission.queues.counts() == {}


def test_a_job_that_waits_for_something_else_lets_others_go_ahead(house: House) -> None:
    house.report(WorkerState.READY)
    first = house.job()
    place = house.admission.admit(first)
    waits = house.waiting(house.job())
    with first.stepped_aside():
        second = waits.get(timeout=HANG_GUARD_S)
    place.leave()
    second.leave()
    assert house.admission.queues.counts() == {}


def test_who_leaves_the_queue_gives_everything_back(house: House) -> None:
    house.report(WorkerState.READY)
    policy = Policy(concurrency=2, tokens_per_minute=1000)
    place = house.admission.admit(house.job(policy))
    gone = house.job(policy)
    waits = house.waiting(gone)
    with pytest.raises(RateLimited, match="2 jobs at once"):
        house.admission.admit(house.job(policy))
    gone.client.leave()
    with pytest.raises(ClientGone):
        waits.get(timeout=HANG_GUARD_S)
    assert house.admission.in_flight == 1
    assert int(house.admission.limits.headers("k", policy)["x-ratelimit-remaining-tokens"]) == 900
    place.leave()
    house.admission.admit(house.job(policy)).leave()


def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    house = House(tmp_path, queue_timeout_s=0.01)
    house.report(WorkerState.READY)
    house.admission.admit(house.job())
    with pytest.raises(Busy, match="waited") as busy:
        house.admission.admit(house.job())
    assert (busy.value.status, house.admission.in_flight) == (503, 1)


def test_a_model_that_a_key_may_not_use_is_no_job(house: House) -> None:
    house.report(WorkerState.READY)
    with pytest.raises(Forbidden, match="'m'"):
        house.admission.admit(house.job(Policy(models=("other*",))))
    assert house.admission.in_flight == 0


def test_slots_are_counted_where_they_are_known(house: House) -> None:
    assert house.capacity.slots("m") == UNBOUNDED
    house.report()
    assert house.capacity.slots("m") == 1
    house.report(WorkerState.READY, slots=4)
    assert house.capacity.slots("m") == 4
    for declared, counted in ((3, 7), (0, UNBOUNDED)):
        line = WorkerLine(name="w", at=HERE, model="m", url="http://127.0.0.1:1/v1", slots=declared)
        host = Host(name="s", at=HERE, hostname="s", user="u", workers=[line])
        report = WorkerReport(name="w", model="m", backend="server", state=WorkerState.READY, slots=declared or 8)
        upstream = Upstream(line.url)
        servers = {"w": Worker("s", report, upstream, upstream)}
        report_of_host = HiveReport(hive="s", url="", version="", epoch=0.0, sequence=0)
        house.fleet.hives["s"] = Hive(report_of_host, Client("unix:"), 0.0, workers=servers, serves=host)
        house.fleet.announce()
        assert house.capacity.slots("m") == counted
