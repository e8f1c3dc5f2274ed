"""The end of what would outlast a server process that is to end: each job is told why, before it is cut."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import gevent

from rbee.errors import ShuttingDown
from rbee.queen.job import Job
from rbee.queen.waiting import CUT_BEFORE_END_S

log = logging.getLogger("rbee.queen.draining")

LOOK_EVERY_S = 0.5


def end_in_time(live: Mapping[str, Job], draining_since: Callable[[], float | None], drain_s: float) -> None:
    """Wait until this process has almost no time left, and end the jobs that run or wait by then.

    A request is answered 503 and a stream ends with an event, both of code `shutting_down`; a job that nobody waits for
    is run by the next process.
    """
    while (since := draining_since()) is None:
        gevent.sleep(LOOK_EVERY_S)
    gevent.sleep(max(0.0, since + drain_s - CUT_BEFORE_END_S - time.monotonic()))
    if live:
        log.warning("%d jobs are cut short: the time to end is over", len(live))
    problem = ShuttingDown("The queen is shutting down; this job was not done", retry_after_s=5)
    for job in list(live.values()):
        job.client.end(problem)
