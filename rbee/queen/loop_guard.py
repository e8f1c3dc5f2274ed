"""Tells who blocks the event loop: nothing else in this process runs meanwhile, no stream and no health check.

A thread of its own looks whether the loop still turns, and logs where it stands when it does not. gunicorn's master
replaces a server process that stands for 30 s; what it did then is known from the log.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Iterator

from gevent import get_hub
from gevent.monkey import get_original
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from rbee.logs import Lines

log = logging.getLogger("rbee.queen.loop")

BEAT_S = 0.1
BLOCKED_S = 1.0
"""From when on a loop counts as blocked. On a machine whose cores are all taken, a few tenths are usual."""
AGAIN_S = 5.0
DEEPEST = 30
"""Frames of a stack that are logged, the innermost."""


class LoopGuard(Collector):
    """Watches the event loop of the thread that starts it. `blocked` is how often it stood still."""

    def __init__(self, blocked_s: float = BLOCKED_S) -> None:
        self.blocked = 0
        self._blocked_s = blocked_s
        self._beat_at = time.monotonic()
        self._ends = get_original("threading", "Event")()

    def start(self) -> None:
        """Begin to watch."""
        timer = get_hub().loop.timer(BEAT_S, BEAT_S, ref=False)
        timer.start(self._beat)
        self._timer = timer
        self._beat()
        # A real thread: a greenlet would stand with the loop.
        get_original("_thread", "start_new_thread")(self._watch, (get_original("_thread", "get_ident")(),))

    def stop(self) -> None:
        """Watch no more."""
        self._ends.set()
        self._timer.close()

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the count for Prometheus."""
        about = f"How often the event loop stood still for {self._blocked_s:g} s or more."
        yield CounterMetricFamily("rbee_event_loop_blocked_total", about, value=self.blocked)

    def _beat(self) -> None:
        self._beat_at = time.monotonic()

    def _watch(self, thread: int) -> None:
        told_at = seen = 0.0
        while not self._ends.wait(self._blocked_s / 4):
            beat_at, now = self._beat_at, time.monotonic()
            if now - beat_at < self._blocked_s:
                continue
            if beat_at != seen:
                seen, told_at = beat_at, now
                self.blocked += 1
            elif now - told_at < AGAIN_S:
                continue
            else:
                told_at = now
            log.error("the event loop has stood still for %.1f s:\n%s", now - beat_at, Lines(_stack(thread)))


def _stack(thread: int) -> str:
    """Return where a thread is; the objects are not kept, for a frame holds everything that it works on."""
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)[-DEEPEST:]) if frame is not None else "its thread has ended"
