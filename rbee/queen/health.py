"""What an exchange says of its worker, and whether a worker that is silent is there at all."""

from __future__ import annotations

from rbee.errors import RbeeError
from rbee.queen.hives import Worker
from rbee.queen.job import Job
from rbee.wire.errors import UpstreamError

PROBE_TIMEOUT_S = 2.0
MAX_PROBE_BYTES = 8 * 1024 * 1024


def failed(job: Job, worker: Worker) -> None:
    """Note that a worker failed a job."""
    job.failed_at.add(worker.id)
    worker.ejection.failed()


def is_fault(problem: UpstreamError, retry_after: str | None) -> bool:
    """Return True when an engine's error answer says that something is wrong with it: not with the request, and not
    that it has no room at present (RFC 9110, 15.6.4).
    """
    return problem.status >= 500 and not (problem.status == 503 and retry_after)


def is_full(problem: UpstreamError) -> bool:
    """Return True when an engine's error answer says that it has no room at present: another worker may have."""
    return problem.status in (429, 503)


def give_up(worker: Worker) -> None:
    """Break off the jobs of which a worker that is not there has answered nothing: another may take them."""
    for job in list(worker.unanswered.values()):
        job.client.cut()


def answers(worker: Worker) -> bool:
    """Ask a worker, on a connection beside its jobs, whether it is there at all."""
    path = "/v1/models" if worker.look is not None else "/health"
    try:
        answer = worker.front.request("GET", path, timeout_s=PROBE_TIMEOUT_S)
        answer.read(MAX_PROBE_BYTES, timeout_s=PROBE_TIMEOUT_S)
    except (RbeeError, ValueError):
        return False
    return answer.status == 200 or (worker.look is not None and answer.status < 500)
