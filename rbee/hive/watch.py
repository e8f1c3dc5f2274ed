"""Lets callers wait until something changes (`GET /v1/hive/watch`)."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from rbee.errors import Busy, InvalidRequest

LONGEST_WAIT_S = 25.0
LOOK_S = 1.0
"""How often a wait looks whether its client is still there."""
MAX_WAITING = 64
AFTER = re.compile(r"(\d{1,12}(?:\.\d{1,9})?):(\d{1,18})")


@dataclass(frozen=True)
class After:
    """The last report that a caller has; epochs are compared as they are written."""

    epoch: float
    sequence: int

    @classmethod
    def parse(cls, text: str) -> After | None:
        """Read `EPOCH:SEQUENCE`; empty: the caller has none. Raises: InvalidRequest."""
        if not text:
            return None
        match = AFTER.fullmatch(text)
        if not match:
            hint = "EPOCH:SEQUENCE of the last report, or nothing"
            raise InvalidRequest(f"after={text[:50]!r} names no report", hint=hint, param="after")
        return cls(float(match[1]), int(match[2]))


class Changes:
    """Tells those who wait that a report which they have is out of date."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._out_of_date = 0
        self._waiting = 0
        self._closed = False

    def changed(self, sequence: int) -> None:
        """Take note that the reports up to `sequence` do not tell everything."""
        with self._condition:
            self._out_of_date = max(self._out_of_date, sequence)
            self._condition.notify_all()

    def close(self) -> None:
        """End every wait, and let none begin."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def wait(self, sequence: int, limit_s: float, gone: Callable[[], bool]) -> None:
        """Wait until the report `sequence` is out of date, `limit_s` is over, the client is gone or all waits end.

        Raises: Busy when too many wait already.
        """
        deadline = time.monotonic() + limit_s
        with self._condition:
            if self._waiting >= MAX_WAITING:
                raise Busy(f"{MAX_WAITING} callers wait for news of this hive, which is the limit", retry_after_s=5)
            self._waiting += 1
            try:
                while not self._closed and self._out_of_date < sequence and not gone():
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return
                    self._condition.wait(min(left, LOOK_S))
            finally:
                self._waiting -= 1
