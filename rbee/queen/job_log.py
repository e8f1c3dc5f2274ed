"""A record for each job at its end, where the operator wants one: what it was and how it went, never its text."""

from __future__ import annotations

import logging
import time

from rbee.logs import clip
from rbee.queen.counting import outcome_of
from rbee.queen.job import DECODE, Job

log = logging.getLogger("rbee.queen.jobs")


def log_job(job: Job, problem: BaseException | None) -> None:
    """Log a job that ended; `problem` is what ended it, None when it was answered."""
    if not log.isEnabledFor(logging.INFO):
        return
    fields = job_fields(job, problem)
    log.info(
        "%s %s: %s after %.3f s at %s",
        job.path,
        fields["model"],
        fields["outcome"],
        fields["duration_s"],
        job.worker_id or "no worker",
        extra={"fields": fields, "job": job.id},
    )


def job_fields(job: Job, problem: BaseException | None) -> dict[str, object]:
    """Return what is told of a job that ended. Times are in seconds since its request came."""
    now, began = time.monotonic(), job.received_at
    turns = [at for _, at in job.phases[1:2]]
    first_bytes = [at for phase, at in job.phases if phase == DECODE]
    return {
        "endpoint": job.path,
        "model": clip(job.request.model),
        "outcome": outcome_of(problem),
        "phase": job.phase,
        "duration_s": round(now - began, 4),
        "queue_s": round((turns[0] if turns else now) - began, 4),
        "first_byte_s": round(first_bytes[0] - began, 4) if first_bytes else None,
        "worker": job.worker_id,
        "attempts": job.attempts,
        "stream": job.stream,
        "priority": job.priority,
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.completion_tokens,
        "key": job.caller.id,
        "tenant": job.tenant,
    }
