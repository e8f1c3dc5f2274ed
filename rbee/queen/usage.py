"""What a job can have used at most: a worker's word is taken up to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rbee.queen.job import Job

TEMPLATE_TOKENS = 16_384
"""What a chat template, the descriptions of tools and images by their address may add to a prompt."""
MAX_WRITTEN_TOKENS = 1_048_576
"""A choice's length where the client has set no limit."""


def possible(job: Job, read: int, written: int) -> tuple[int, int]:
    """Return the tokens read and written, or what is possible where that is less.

    No token of a prompt is less than a byte of the request. Hidden reasoning counts against the client's limit.
    """
    choices = getattr(job.request, "n", None) or 1
    limit = job.request.output_limit() or MAX_WRITTEN_TOKENS
    return min(read, len(job.body) + TEMPLATE_TOKENS), min(written, limit * choices)
