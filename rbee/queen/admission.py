"""Who may enter, and when: allowed models, the script's word, the key's limits, then the model's queue."""

from __future__ import annotations

import time
from collections.abc import Callable

import gevent

from rbee.errors import Busy, Forbidden, QueueFull
from rbee.queen.capacity import Capacity
from rbee.queen.counting import outcome_of
from rbee.queen.job import Job
from rbee.queen.limits import Charge, Limits
from rbee.queen.metrics import Metrics
from rbee.queen.queueing import ModelQueue, Queues, Ticket
from rbee.queen.script import RoutingScript
from rbee.queen.tenants import TenantMetrics

UNQUEUED = frozenset({"/v1/messages/count_tokens"})
"""Endpoints that take no slot of a worker."""


class Place:
    """A job's place among those in flight; it is left once, with the way the job ended."""

    def __init__(self, admission: Admission, job: Job, charge: Charge | None) -> None:
        self._admission = admission
        self._job: Job | None = job
        self.charge = charge
        self.queue: ModelQueue | None = None
        self.granted_at = 0.0

    def leave(self, problem: BaseException | None = None) -> None:
        """Give the place back. `problem` is what ended the job, None when it was answered."""
        job, self._job = self._job, None
        if job is not None:
            job.client.close()
            self._admission.left(job, self, problem)
            if job.on_end is not None:
                job.on_end(job, problem)

    def aside(self, waits: bool) -> None:
        """Let others of the queue go ahead while this job waits for something else than a slot."""
        if self.queue is not None and self._job is not None:
            self.queue.running += -1 if waits else 1
            if waits:
                self._admission.grant(self._job.request.model)


class Admission:
    """Counts the jobs in flight, refuses what is too much, and has the rest wait for their turn."""

    def __init__(
        self,
        limit: int,
        script: RoutingScript,
        metrics: Metrics,
        capacity: Capacity,
        *,
        limits: Limits | None = None,
        tenants: TenantMetrics | None = None,
        queue_limit: int = 256,
        queue_timeout_s: float = 600.0,
        starvation_s: float = 30.0,
    ) -> None:
        self.in_flight = 0
        self.limits = limits or Limits()
        self.tenants = tenants or TenantMetrics()
        self.queues = Queues(capacity.slots, limit=queue_limit, starvation_s=starvation_s)
        self._limit = limit
        self._script = script
        self._metrics = metrics
        self._capacity = capacity
        self._queue_timeout_s = queue_timeout_s
        self._follower: gevent.Greenlet[[], None] | None = None

    def admit(self, job: Job, check: Callable[[Job], None] = lambda job: None) -> Place:
        """Give a job a place, once it is its turn. `check` refuses one that would wait for nothing.

        Raises: what `check` raises; Forbidden, Busy, Refused, QueueFull, RateLimited; ClientGone or DeadlineExceeded
        when its client waits no longer.
        """
        if not job.caller.policy.allows(job.request.model):
            raise Forbidden(f"This API key may not use the model {job.request.model[:120]!r}", hint="GET /v1/models")
        if self.in_flight >= self._limit:
            raise Busy(f"{self.in_flight} jobs are in flight, which is the limit", retry_after_s=1)
        self._script.check_admission(job.record(), self.in_flight)
        tokens = estimate(job)
        place = Place(self, job, self.limits.enter(job.caller.id, job.caller.policy, tokens))
        self.in_flight += 1
        self._metrics.started(job)
        self.tenants.started(job)
        try:
            if job.path not in UNQUEUED:
                self._wait_for_turn(job, place, tokens, check)
        except BaseException as problem:
            place.leave(problem)
            raise
        return place

    def left(self, job: Job, place: Place, problem: BaseException | None) -> None:
        """Count a job that has ended, and let the next one run."""
        self.in_flight -= 1
        used = job.prompt_tokens + job.completion_tokens
        # Where an engine told nothing, what was reserved stands for it, if anything was done at all.
        self.limits.settle(place.charge, used or (estimate(job) if job.worker_id else 0))
        outcome = outcome_of(problem)
        self._metrics.ended(job, outcome)
        self.tenants.ended(job, outcome)
        if place.queue is not None:
            place.queue.done(time.monotonic() - place.granted_at)
            self.grant(job.request.model)

    def grant(self, model: str) -> None:
        """Let those who wait for a model run, where there is room."""
        self.queues.grant(model)

    def status(self, job: Job) -> dict[str, object]:
        """Return what is happening to a job that has no answer yet: queued, loading or running."""
        model = job.request.model
        told: dict[str, object] = {"model": model, "state": "running", "waiting": self.queues.waiting(model)}
        progress = self._capacity.progress(model)
        if progress is not None:
            return {**told, "state": "loading", "progress": round(progress, 3)}
        return {**told, "state": "queued"} if job.queued else told

    def _wait_for_turn(self, job: Job, place: Place, tokens: int, check: Callable[[Job], None]) -> None:
        model = job.request.model
        capacity, queue = self.queues.capacity(model), self.queues.of(model)
        try:
            ticket = queue.enter(job.priority, job.caller.id, tokens, capacity)
        except QueueFull as problem:
            doing = self._doing(model)
            raise QueueFull(f"{problem.message}{doing}", retry_after_s=problem.retry_after_s) from None
        if ticket is not None:
            self._wait(job, queue, ticket, check)
        place.queue, place.granted_at = queue, time.monotonic()
        job.aside = place.aside

    def _wait(self, job: Job, queue: ModelQueue, ticket: Ticket, check: Callable[[Job], None]) -> None:
        job.queued = True
        if self._follower is None or self._follower.dead:
            self._follower = gevent.spawn(self._follow)
        try:
            check(job)
            gevent.wait([ticket.granted, job.client.gone], timeout=self._queue_timeout_s, count=1)
            job.client.check()
            if ticket.left:
                raise QueueFull(
                    f"The queue is full, and others' jobs came before this one{self._doing(job.request.model)}",
                    retry_after_s=queue.retry_after_s(self.queues.capacity(job.request.model)),
                )
            if not ticket.granted.is_set():
                raise Busy(
                    f"This job waited {self._queue_timeout_s:g} s for its turn{self._doing(job.request.model)}",
                    retry_after_s=queue.retry_after_s(self.queues.capacity(job.request.model)),
                )
        except BaseException:
            queue.leave(job.priority, ticket)
            self.grant(job.request.model)
            raise
        finally:
            job.queued = False

    def _follow(self) -> None:
        """While anybody waits, look again whenever workers come, go or get ready."""
        changed = self._capacity.changed
        while self.queues.grant_all():
            changed.wait(1.0)
            changed = self._capacity.changed

    def _doing(self, model: str) -> str:
        progress = self._capacity.progress(model)
        return "" if progress is None else f"; {model} is loading ({progress:.0%})"


def estimate(job: Job) -> int:
    """Return about how many tokens a job takes: its prompt at four bytes a token, and the most that it asks for."""
    return job.request.prompt_bytes() // 4 + (job.request.output_limit() or 0)
