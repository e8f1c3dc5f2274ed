"""How late the event loop is: what holds it up holds up every stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from gevent import get_hub

from rbee.queen.counting import Distributions

TICK_S = 0.02
WINDOW_S = 60.0
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class LoopLag:
    """Asks to be called every `TICK_S`, and notes by how much each call came late."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.lags = Distributions(
            "rbee_event_loop_lag_seconds", "How late the event loop called what was due.", (), SECONDS
        )
        self._clock = clock
        self._timer: Any = None
        self._called_at = self._turned_at = clock()
        self._longest_s, self._longest_before_s = 0.0, 0.0

    def start(self) -> None:
        """Begin, in this process' event loop."""
        self._called_at = self._turned_at = self._clock()
        self._timer = get_hub().loop.timer(TICK_S, TICK_S, ref=False)
        self._timer.start(self.tick)

    def tick(self) -> None:
        """Note one call."""
        now = self._clock()
        lag = max(0.0, now - self._called_at - TICK_S)
        self._called_at = now
        self.lags[()].observe(lag)
        if now - self._turned_at >= WINDOW_S / 2:
            self._turned_at, self._longest_before_s, self._longest_s = now, self._longest_s, lag
        elif lag > self._longest_s:
            self._longest_s = lag

    @property
    def longest_s(self) -> float:
        """Return the longest lag of the last half minute to a minute: whoever asks, it is not lost for others."""
        return max(self._longest_s, self._longest_before_s)
