"""From a job that ended to the row that its key is charged by."""

from __future__ import annotations

import time

from rbee.errors import RbeeError, ShuttingDown
from rbee.queen.client_watch import ClientGone
from rbee.queen.counting import code_of
from rbee.queen.job import Job
from rbee.queen.job_rows import TakenJob
from rbee.queen.ledger import Ended, owner_of
from rbee.wire.errors import ErrorDetail, UpstreamError, detail_of, encode_detail
from rbee.wire.jobs import JobStatus, JobView


def ended_row(job: Job, problem: BaseException | None) -> Ended:
    """Return the row of a job that ended; `problem` is what ended it, None when it was answered."""
    return Ended(
        job.id,
        owner_of(job.caller),
        job.caller.id,
        job.path,
        job.request.model,
        status_of(problem),
        job.created_at,
        time.time(),
        job.worker_id,
        job.prompt_tokens,
        job.completion_tokens,
        encode_detail(kept_error(job, problem)) if problem is not None else "",
        job.usage_estimated,
    )


def status_of(problem: BaseException | None) -> JobStatus:
    """Return a job's last state."""
    if problem is None:
        return JobStatus.COMPLETED
    if isinstance(problem, (ClientGone, GeneratorExit)):
        return JobStatus.CANCELLED
    return JobStatus.INTERRUPTED if isinstance(problem, ShuttingDown) else JobStatus.FAILED


def error_of(problem: BaseException) -> ErrorDetail:
    """Return what is recorded and shown of a problem; what is not rbee's own may hold anything, so it is not told."""
    if isinstance(problem, RbeeError):
        return detail_of(problem)
    if isinstance(problem, (ClientGone, GeneratorExit)):
        return ErrorDetail(message="The job was cancelled", type="cancelled", code="cancelled")
    return ErrorDetail(message="An internal error occurred", type="server_error", code="internal_error")


def kept_error(job: Job, problem: BaseException) -> ErrorDetail:
    """Return what is recorded of a problem. Engines repeat prompts in theirs, which their client has read already.

    The error of a job that nobody waited for is its answer.
    """
    if not isinstance(problem, UpstreamError) or job.kind != "request":
        return error_of(problem)
    words = f"The engine answered {problem.status}; what it said went to the client only"
    return ErrorDetail(message=words, type="upstream_error", code=code_of(problem))


def unread_row(taken: TakenJob, problem: BaseException | None) -> Ended:
    """Return the row of a job that could not even be read again."""
    error = encode_detail(error_of(problem)) if problem is not None else ""
    now = time.time()
    return Ended(
        taken.id, taken.owner, taken.key, taken.endpoint, taken.model, status_of(problem), taken.created_at, now, "",
        0, 0, error,
    )  # fmt: skip


def live_view(job: Job, status: JobStatus = JobStatus.RUNNING) -> JobView:
    """Return how a job is shown while a client waits for it."""
    return JobView(
        id=job.id,
        status=status,
        kind="request",
        endpoint=job.path,
        model=job.request.model,
        priority=job.priority,
        key=job.caller.id,
        worker=job.worker_id,
        created_at=job.created_at,
        started_at=job.created_at,
        metadata=job.metadata,
    )
