"""Bring a job to the first of its chosen places that takes it; start the worker when there is none."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from gevent import sleep, spawn

from rbee.errors import LoadFailed, Lost, RbeeError, TimedOut, Unreachable, WorkerLost
from rbee.queen.fleet import Fleet
from rbee.queen.hives import Worker
from rbee.queen.job import Exchange, Job
from rbee.queen.loads import Loads
from rbee.queen.places import Candidate
from rbee.wire.fleet import WorkerState

log = logging.getLogger("rbee.queen.dispatch")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0


class Dispatch:
    """Sends jobs to workers."""

    def __init__(self, fleet: Fleet, loads: Loads, *, first_byte_timeout_s: float) -> None:
        self._fleet = fleet
        self._loads = loads
        self._first_byte_timeout_s = first_byte_timeout_s

    def send(self, job: Job, ranked: Sequence[Candidate]) -> Exchange:
        """Return the exchange with the first place that answers.

        Places that cannot be reached at all are passed over. Raises: Lost, LoadFailed, Busy, ClientGone.
        """
        problem: RbeeError | None = None
        for candidate in ranked:
            try:
                worker = self._ready_worker(job, candidate)
                return self._send(job, candidate, worker)
            except (Unreachable, LoadFailed) as found:
                log.warning("job %s: %s: %s", job.id, candidate.id, found)
                problem = found
        raise problem or WorkerLost("No worker was left to try")

    def _ready_worker(self, job: Job, candidate: Candidate) -> Worker:
        if candidate.worker and candidate.worker.ready:
            return candidate.worker
        return self._loads.wait(job, candidate)

    def _send(self, job: Job, candidate: Candidate, worker: Worker) -> Exchange:
        upstream = worker.upstream(job.path, stream=job.stream)
        started = time.monotonic()
        worker.in_flight += 1
        try:
            answer = upstream.request(
                "POST",
                job.path,
                job.body,
                headers={"Content-Type": "application/json", "X-Rbee-Job": job.id},
                timeout_s=self._first_byte_timeout_s,
                wait=lambda answer: job.client.call_when_gone(answer.close),
            )
        except BaseException as problem:
            worker.in_flight -= 1
            job.client.call_when_gone(None)
            job.client.check()
            if isinstance(problem, Lost):
                self._suspect(worker, problem)
            raise
        worker.ttft_ms = _smooth(worker.ttft_ms, (time.monotonic() - started) * 1000)
        job.worker_id = worker.id
        return Exchange(worker, candidate, answer)

    def _suspect(self, worker: Worker, problem: Lost) -> None:
        """Take a worker that broke a connection out of routing, and find out what became of it."""
        if isinstance(problem, TimedOut) or worker.lost:
            return
        worker.lost = True
        spawn(self._find_out, worker)

    def _find_out(self, worker: Worker) -> None:
        """Ask its hive, then the worker itself until it answers or its hive tells of its end."""
        try:
            self._fleet.look(worker.hive, timeout_s=2.0)
        except RbeeError as problem:
            log.warning("hive %s: %s", worker.hive, problem)
            self._fleet.forget_unreachable(worker.hive)
        pause_s = FIRST_PAUSE_S
        while self._fleet.has(worker) and worker.report.state is WorkerState.READY:
            if _healthy(worker):
                worker.lost = False
                self._fleet.announce()
                return
            sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _healthy(worker: Worker) -> bool:
    try:
        answer = worker.front.request("GET", "/health", timeout_s=2.0)
        answer.read(1_000_000, timeout_s=2.0)
    except (RbeeError, ValueError):
        return False
    return answer.status == 200


def _smooth(old: float, new: float) -> float:
    return new if old == 0.0 else 0.8 * old + 0.2 * new
