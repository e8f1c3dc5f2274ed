"""Who may enter, and how many at once."""

from __future__ import annotations

from rbee.errors import Busy, RbeeError
from rbee.queen.client_watch import ClientGone
from rbee.queen.job import Job
from rbee.queen.metrics import Metrics
from rbee.queen.script import RoutingScript


class Place:
    """A job's place among those in flight; it is left once, with the way the job ended."""

    def __init__(self, admission: Admission, job: Job) -> None:
        self._admission = admission
        self._job: Job | None = job

    def leave(self, problem: BaseException | None = None) -> None:
        """Give the place back. `problem` is what ended the job, None when it was answered."""
        job, self._job = self._job, None
        if job is not None:
            job.client.close()
            self._admission.left(job, problem)


class Admission:
    """Counts the jobs in flight and refuses what is too much."""

    def __init__(self, limit: int, script: RoutingScript, metrics: Metrics) -> None:
        self.in_flight = 0
        self._limit = limit
        self._script = script
        self._metrics = metrics

    def admit(self, job: Job) -> Place:
        """Give a job a place. Raises: Busy, Refused."""
        if self.in_flight >= self._limit:
            raise Busy(f"{self.in_flight} jobs are in flight, which is the limit", retry_after_s=1)
        self._script.check_admission(job.record(), self.in_flight)
        self.in_flight += 1
        self._metrics.started(job)
        return Place(self, job)

    def left(self, job: Job, problem: BaseException | None) -> None:
        """Count a job that has ended."""
        self.in_flight -= 1
        self._metrics.ended(job, _outcome(problem))


def _outcome(problem: BaseException | None) -> str:
    if problem is None:
        return "ok"
    if isinstance(problem, RbeeError):
        return problem.code or "error"
    return "cancelled" if isinstance(problem, (ClientGone, GeneratorExit)) else "error"
