"""Bring a job to the first of its chosen places that takes it; start the worker when there is none.

What a worker's exchanges come to is kept with the worker (`ejection`), and decides whether it is sent more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import msgspec
from gevent import sleep, spawn

from rbee.errors import DeadlineExceeded, LoadFailed, Lost, RbeeError, TimedOut, Unreachable, WorkerLost
from rbee.queen.ejection import RetryBudget
from rbee.queen.fleet import Fleet
from rbee.queen.health import answers, failed, give_up
from rbee.queen.hives import Worker
from rbee.queen.job import PREFILL, WHOLE, Exchange, Job, smoothed
from rbee.queen.loads import Loads
from rbee.queen.places import Candidate
from rbee.queen.reach import Reach
from rbee.wire.fleet import WorkerState

log = logging.getLogger("rbee.queen.dispatch")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0


class Dispatch:
    """Sends jobs to workers."""

    def __init__(self, fleet: Fleet, loads: Loads, *, first_byte_timeout_s: float) -> None:
        self._fleet = fleet
        self._loads = loads
        self._first_byte_timeout_s = first_byte_timeout_s
        self._budget = RetryBudget()
        spawn(Reach(fleet, self._suspect).run)

    def send(self, job: Job, ranked: Sequence[Candidate]) -> Exchange:
        """Return the exchange with the first place that answers.

        Places that cannot be reached at all are passed over. Raises: Lost, LoadFailed, Busy, ClientGone.
        """
        if job.attempts == 1:
            self._budget.count()
        problem: RbeeError | None = None
        for candidate in ranked:
            try:
                worker = self._ready_worker(job, candidate)
                return self._send(job, candidate, worker)
            except (Unreachable, LoadFailed) as found:
                log.warning("job %s: %s: %s", job.id, candidate.id, found)
                problem = found
        raise problem or WorkerLost("No worker was left to try")

    def may_retry(self, job: Job, problem: RbeeError) -> bool:
        """Return True, and count a retry, when a job of which its client has seen nothing should be sent again.

        A worker that broke off may have died; one that answered with an error of its own is worth a retry only where
        another has the model: a request that no worker can bear must not be tried until they are all ejected.
        """
        if isinstance(problem, DeadlineExceeded):
            return False
        if not isinstance(problem, Lost) and not (job.failed_at and self._others(job)):
            return False
        allowed = self._budget.take()
        if not allowed:
            log.warning("job %s is not sent again: too many jobs of late were", job.id)
        return allowed

    def _others(self, job: Job) -> bool:
        """Return True when a ready worker is left that has not failed this job."""
        request = job.request
        try:
            places = self._fleet.candidates(request.model, request.capability, request.needs(), job.hive_wish)
        except RbeeError:
            return False
        return any(place.worker and place.worker.ready and place.id not in job.failed_at for place in places)

    def _ready_worker(self, job: Job, candidate: Candidate) -> Worker:
        if candidate.worker and candidate.worker.ready:
            return candidate.worker
        return self._loads.wait(job, candidate)

    def _send(self, job: Job, candidate: Candidate, worker: Worker) -> Exchange:
        upstream = worker.upstream(job.path, stream=job.stream)
        started = time.monotonic()
        worker.in_flight += 1
        worker.unanswered[job.id] = job
        worker.ejection.sent()
        job.enter(PREFILL if job.stream else WHOLE)
        headers = {"Content-Type": "application/json", "X-Rbee-Job": job.id}
        if job.trace is not None:
            headers.update(job.trace.headers(worker.upstream_model))
        try:
            answer = upstream.request(
                "POST",
                job.path,
                _renamed(job.body, worker.upstream_model) if worker.upstream_model else job.body,
                headers=headers,
                timeout_s=self._first_byte_timeout_s,
                wait=lambda answer: job.client.call_when_gone(answer.close),
            )
        except BaseException as problem:
            worker.in_flight -= 1
            worker.unanswered.pop(job.id, None)
            job.client.call_when_gone(None)
            if isinstance(problem, Lost) and not job.client.gone.is_set():
                failed(job, worker)
                self._suspect(worker, problem)
            worker.ejection.dropped()
            job.client.check()
            raise
        worker.ttft_ms = smoothed(worker.ttft_ms, (time.monotonic() - started) * 1000)
        job.worker_id = worker.id
        return Exchange(worker, candidate, answer)

    def _suspect(self, worker: Worker, problem: Lost) -> None:
        """Take a worker that broke a connection out of routing, and find out what became of it."""
        if isinstance(problem, TimedOut) or worker.lost:
            return
        if worker.look is not None:
            # A connection that broke is no end yet, and whether it is one is known in a moment.
            worker.lost = isinstance(problem, Unreachable)
            worker.look()
            return
        worker.lost = True
        spawn(self._find_out, worker, isinstance(problem, Unreachable))

    def _find_out(self, worker: Worker, unreachable: bool) -> None:
        """Ask its hive, then the worker itself until it answers or its hive tells of its end."""
        if unreachable and not answers(worker):
            give_up(worker)
        try:
            self._fleet.look(worker.hive, timeout_s=2.0)
        except RbeeError as problem:
            log.warning("hive %s: %s", worker.hive, problem)
            self._fleet.forget_unreachable(worker.hive)
        pause_s = FIRST_PAUSE_S
        while self._fleet.has(worker) and worker.report.state is WorkerState.READY:
            if answers(worker):
                worker.lost = False
                self._fleet.announce()
                return
            give_up(worker)
            sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _renamed(body: bytes, model: str) -> bytes:
    """Return a request with another model's name; everything else stays as it was written."""
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)
