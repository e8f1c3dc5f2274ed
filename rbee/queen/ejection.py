"""Workers that keep failing are left out for a while (outlier ejection, half-open probes), and retries are bounded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rbee.queen.places import Candidate

FAILURES = 5
"""Failures in a row after which a worker is ejected."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 30.0
PROBE_LEASE_S = 10.0
"""How long another process' probe keeps this one from sending its own: that one may die with it."""
RETRY_SHARE = 0.2
WINDOW_S = 10.0
FEW_RETRIES = 10
"""Retries in a window that are always allowed: where few jobs run, a fifth of them is none."""


class Ejection:
    """How the jobs of one worker end, and whether it is left out for that. `changed` is called when that is another.

    `tell` is given what other processes must know, and `hear` takes it there: an event, and the pause of an ejection.

    closed ──5 failures in a row──▶ open ──after a pause──▶ half-open (one job at a time)
       ▲                             ▲───────the job fails─────┤ (the pause doubles, to 30 s)
       └──────────────────────────the job's answer begins──────┘
    """

    def __init__(
        self,
        changed: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.monotonic,
        tell: Callable[[str, float], None] = lambda event, pause_s: None,
    ) -> None:
        self.failures = 0
        self.answered_at = float("-inf")
        """When an answer of it last began (time.monotonic())."""
        self._changed = changed
        self._now = now
        self._tell = tell
        self._open_until: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._probes = False

    @property
    def ejected(self) -> bool:
        """Return True while jobs should go elsewhere."""
        return self._open_until is not None and (self._probes or self._now() < self._open_until)

    def sent(self) -> None:
        """Note that a job is on its way there; of a half-open worker, it is the probe."""
        if self._open_until is not None and not self._probes and self._now() >= self._open_until:
            self._probes = True
            self._tell("probes", 0.0)
            self._changed()

    def began(self) -> None:
        """Note that an answer without an error has begun."""
        self.answered_at = self._now()
        if self._open_until is not None:
            self._close()
            self._tell("back", 0.0)

    def succeeded(self) -> None:
        """Note that an answer came to its end."""
        if self.failures:
            self.failures = 0
            self._tell("succeeded", 0.0)

    def dropped(self) -> None:
        """Note that a job ended for a reason that says nothing of the worker: its client left, or its time was over."""
        if self._probes:
            self._probes = False
            self._tell("dropped", 0.0)

    def failed(self) -> None:
        """Note that a worker broke a job, or answered with an error of its own."""
        self.failures += 1
        if self._open_until is not None:
            if self._probes:
                self._eject(min(2 * self._pause_s, LONGEST_PAUSE_S))
                self._tell("ejected", self._pause_s)
            return
        self._tell("failed", 0.0)
        if self.failures >= FAILURES:
            self._eject(self._pause_s)

    def hear(self, event: str, pause_s: float) -> None:
        """Take what another process told of this worker."""
        if event == "failed" and self._open_until is None:
            self.failures += 1
            if self.failures >= FAILURES:
                self._eject(self._pause_s)
        elif event == "succeeded":
            self.failures = 0
        elif event == "ejected":
            self._eject(min(max(pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S))
        elif event == "back" and self._open_until is not None:
            self._close()
        elif event == "probes" and self._open_until is not None and not self._probes:
            self._open_until = self._now() + PROBE_LEASE_S
        elif event == "dropped" and self._open_until is not None and not self._probes:
            self._open_until = self._now()

    def _close(self) -> None:
        self._open_until, self._probes, self.failures, self._pause_s = None, False, 0, FIRST_PAUSE_S
        self._changed()

    def _eject(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._open_until, self._probes = self._now() + pause_s, False
        self._changed()


def spared(places: Sequence[Candidate]) -> list[Candidate]:
    """Return the places without ejected workers; of a model that has no other ready worker, all stay."""
    kept = [place for place in places if place.worker is None or not place.worker.ejection.ejected]
    ready = any(place.worker is not None and place.worker.ready for place in kept)
    return kept if ready else list(places)


class RetryBudget:
    """Allows retries up to a share of the jobs of late, so that they cannot multiply the load of a fleet in trouble."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._turn = 0
        self._jobs, self._jobs_before = 0, 0
        self._retries, self._retries_before = 0, 0

    def count(self) -> None:
        """Count a job."""
        self._advance()
        self._jobs += 1

    def take(self) -> bool:
        """Return True, and count a retry, while there is room for one."""
        self._advance()
        jobs, retries = self._jobs + self._jobs_before, self._retries + self._retries_before
        if retries >= max(FEW_RETRIES, RETRY_SHARE * jobs):
            return False
        self._retries += 1
        return True

    def _advance(self) -> None:
        """Let counts grow old: those of this half of the window and of the one before it hold."""
        turn = int(self._now() / (WINDOW_S / 2))
        if turn != self._turn:
            follows = turn == self._turn + 1
            self._jobs_before, self._retries_before = (self._jobs, self._retries) if follows else (0, 0)
            self._jobs, self._retries, self._turn = 0, 0, turn
