"""How much happens a second: counts that only grow are looked at once a second, and compared with those of before."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NoReturn

import gevent

WINDOW_S = 5.0
LOOK_EVERY_S = 1.0

Counts = Mapping[str, float]


class Rates:
    """The counts of the last `WINDOW_S`. `read` returns those of this moment, by name."""

    def __init__(self, read: Callable[[], Counts], now: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._now = now
        self._seen: deque[tuple[float, Counts]] = deque(maxlen=round(WINDOW_S / LOOK_EVERY_S))

    def run(self) -> NoReturn:
        """Look for ever."""
        while True:
            self.look()
            gevent.sleep(LOOK_EVERY_S)

    def look(self) -> None:
        """Take the counts of this moment."""
        self._seen.append((self._now(), self._read()))

    def per_second(self) -> tuple[dict[str, float], float]:
        """Return how much each count has grown a second, and over how many seconds.

        A count that was not there before, such as that of a worker that has just come, has grown from nothing; one
        that is smaller than before, of a worker that was replaced, has grown by all that it is.
        """
        if not self._seen:
            return {}, 0.0
        began, before = self._seen[0]
        took_s = self._now() - began
        if took_s <= 0:
            return {}, 0.0
        grown = {}
        for name, count in self._read().items():
            more = count - before.get(name, 0.0)
            grown[name] = (more if more >= 0 else count) / took_s
        return grown, took_s
