"""Slots of an answering engine: jobs beyond them wait in order, and those whose client leaves are never run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rbee.errors import Busy

LOOK_S = 0.05


class Slots:
    """`count` jobs at once, first come, first served."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()

    @property
    def waiting(self) -> int:
        """The number of jobs that wait."""
        return len(self._queue)

    @contextmanager
    def one(self, given_up: Callable[[], bool]) -> Iterator[None]:
        """Hold a slot; `given_up` is asked every 50 ms of the wait. Raises: Busy when it said yes."""
        self._take(given_up)
        try:
            yield
        finally:
            self._release()

    def _take(self, given_up: Callable[[], bool]) -> None:
        with self._lock:
            if self._free and not self._queue:
                self._free -= 1
                return
            turn = threading.Event()
            self._queue.append(turn)
        try:
            while not turn.wait(LOOK_S):
                if given_up():
                    raise Busy("the job was given up while it waited for a slot")
        except BaseException:
            self._leave(turn)
            raise

    def _leave(self, turn: threading.Event) -> None:
        with self._lock:
            if not turn.is_set():
                self._queue.remove(turn)
                return
        # The slot was handed over in the same moment.
        self._release()

    def _release(self) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft().set()
            else:
                self._free += 1
