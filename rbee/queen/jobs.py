"""One job from the request to its last byte: admit → rank → dispatch → relay.

Admission, routing and dispatch do not know each other; they meet here. Values go down, errors go up, bytes flow back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rbee.errors import RbeeError
from rbee.logs import serving
from rbee.queen.accounts import ended_row
from rbee.queen.admission import Admission, Place
from rbee.queen.dispatch import Dispatch
from rbee.queen.job import QUEUED, ROUTING, Job, Reply
from rbee.queen.metrics import Metrics
from rbee.queen.records import Records
from rbee.queen.relay import Relay
from rbee.queen.routing import Routing

ATTEMPTS = 2
"""A job is sent again only while the client has seen nothing of an answer, and once."""


if TYPE_CHECKING:
    from rbee.queen.tracing import Tracing

Observer = Callable[[Job, BaseException | None], None]
"""Is told of each job that has ended, and what ended it: None when it was answered."""


class Jobs:
    """The middle of the queen."""

    def __init__(
        self,
        admission: Admission,
        routing: Routing,
        dispatch: Dispatch,
        relay: Relay,
        metrics: Metrics,
        records: Records,
    ) -> None:
        self.live: dict[str, Job] = {}
        self.observers: list[Observer] = []
        self.tracing: Tracing | None = None
        self._records = records
        self._admission = admission
        self._routing = routing
        self._dispatch = dispatch
        self._relay = relay
        self._metrics = metrics

    def never_begun(self, number: int = 1) -> None:
        """Note that jobs were cancelled of which none had begun to run."""
        self._metrics.never_begun(number)

    def run(self, job: Job) -> Reply:
        """Take a job through its life and return its reply once the first bytes are here.

        Raises: RbeeError of every family; ClientGone when nobody waits for the answer any more.
        """
        self._records.check()
        # It can be cancelled by its id from here on, while it waits for its turn, too.
        self.live[job.id] = job
        job.on_end = self._ended
        serving(job.id)
        if self.tracing is not None and job.trace is None:
            self.tracing.begin(job)
        job.enter(QUEUED)
        try:
            place = self._admission.admit(job, self._routing.check)
        except BaseException as problem:
            if self.live.pop(job.id, None) is not None:
                self._tell(job, problem)
            self._metrics.turned_away(job, problem)
            raise
        try:
            self._metrics.granted(job)
            return self._attempt(job, place)
        except BaseException as problem:
            self._metrics.turned_away(job, problem)
            place.leave(problem)
            raise

    def _attempt(self, job: Job, place: Place) -> Reply:
        while True:
            job.attempts += 1
            job.enter(ROUTING)
            try:
                ranked = self._routing.rank(job)
                job.tell("routed", ranked[0].id)
                exchange = self._dispatch.send(job, ranked)
                self._routing.served(job)
                job.tell("started", job.worker_id)
                return self._relay.reply(job, exchange, place)
            except RbeeError as problem:
                job.client.check()
                if job.attempts >= ATTEMPTS or not self._dispatch.may_retry(job, problem):
                    raise
                self._metrics.retried(job)

    def _tell(self, job: Job, problem: BaseException | None) -> None:
        for observe in self.observers:
            observe(job, problem)

    def _ended(self, job: Job, problem: BaseException | None) -> None:
        self.live.pop(job.id, None)
        job.problem, job.answered = problem, problem is None
        self._tell(job, problem)
        if job.kind == "request":
            self._records.ended(ended_row(job, problem))
