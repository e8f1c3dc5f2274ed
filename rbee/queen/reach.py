"""Whether the machines can be reached at which jobs wait for the first byte of their answers.

A kept connection to a machine that is gone takes a request without a word: the kernel tries to deliver it for 20 s. A
new connection is made at once, or not at all, however busy the worker is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn

import gevent

from rbee.errors import RbeeError, Unreachable
from rbee.queen.fleet import Fleet
from rbee.queen.hives import Worker

WAIT_S = 2.0
"""How long a job has waited when this is found out, and how often it is while it waits on."""


class Reach:
    """Looks after the jobs that wait. `unreachable` is told of a worker to which no connection can be made."""

    def __init__(self, fleet: Fleet, unreachable: Callable[[Worker, Unreachable], None]) -> None:
        self._fleet = fleet
        self._unreachable = unreachable

    def run(self) -> NoReturn:
        """Look for ever."""
        while True:
            gevent.sleep(WAIT_S / 2)
            now = time.monotonic()
            for hive in self._fleet.hives.values():
                for worker in hive.workers.values():
                    if not worker.lost and _waits(worker, now):
                        worker.reached_at = now
                        gevent.spawn(self._try, worker)

    def _try(self, worker: Worker) -> None:
        try:
            worker.front.connect()
        except Unreachable as problem:
            worker.front.close()  # the connections that are kept lead to the same place
            self._unreachable(worker, problem)
        except RbeeError:
            pass  # it is this machine that can make no connection


def _waits(worker: Worker, now: float) -> bool:
    """Return True when a job waits there, and nothing has shown of late that the machine is there."""
    oldest = next(iter(worker.unanswered.values()), None)
    if oldest is None:
        return False
    return now - max(oldest.phases[-1][1], worker.ejection.answered_at, worker.reached_at) >= WAIT_S
