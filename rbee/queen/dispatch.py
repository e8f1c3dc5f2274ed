"""Bring a job to the first of its chosen places that takes it; start the worker when there is none."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from gevent import spawn

from rbee.errors import LoadFailed, Lost, RbeeError, TimedOut, Unreachable, WorkerLost
from rbee.queen.fleet import Candidate, Fleet, Worker
from rbee.queen.job import Exchange, Job
from rbee.queen.loads import Loads
from rbee.wire.fleet import HiveReport

log = logging.getLogger("rbee.queen.dispatch")


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
        """Take a worker that broke a connection out of routing, and ask its hive what became of it."""
        if isinstance(problem, TimedOut):
            return
        worker.lost = True
        spawn(self._ask_hive, worker)

    def _ask_hive(self, worker: Worker) -> None:
        try:
            hive = self._fleet.hive(worker.hive)
            self._fleet.learn(hive.client.get("/v1/hive", HiveReport, timeout_s=2.0))
        except RbeeError as problem:
            log.warning("hive %s: %s", worker.hive, problem)
            self._fleet.forget_unreachable(worker.hive)


def _smooth(old: float, new: float) -> float:
    return new if old == 0.0 else 0.8 * old + 0.2 * new
