"""Receiving from workers in greenlets, with one timer for everyone who waits.

A thousand streams receive twenty thousand times a second. To try first, as gevent's sockets do, finds nothing nearly
every time, and to start and stop a timer takes as long as the rest; so a greenlet waits first, and its time is looked
at by one patrol.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import time
from typing import Any, NoReturn

import gevent
from gevent import get_hub, getcurrent

from rbee.http.upstream import RECEIVE_BYTES, Upstream, receive

PATROL_EVERY_S = 0.25
SHORT_S = 1.0
"""A shorter wait has a timer of its own: the patrol would notice too late."""


def receive_from_workers() -> None:
    """Have everything in this process that asks a worker receive in this way."""
    receiver = Receiver()
    receiver.start()
    Upstream.receive = receiver.receive


class Receiver:
    """Receives for all the greenlets of one process."""

    def __init__(self) -> None:
        self._waiting: dict[Any, float] = {}

    def start(self) -> None:
        """Begin to look at the times of those who wait."""
        gevent.spawn(self._patrol)

    def receive(self, sock: Any, timeout_s: float | None) -> bytes:
        """Return what came next, b"" at the end. Raises: OSError; TimeoutError when nothing came in time."""
        inner: socket.socket | None = getattr(sock, "_sock", None)
        if inner is None or isinstance(sock, ssl.SSLSocket) or (timeout_s is not None and timeout_s < SHORT_S):
            return receive(sock, timeout_s)
        me = getcurrent()
        while True:
            watcher = sock._read_event
            if watcher is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if timeout_s is not None:
                self._waiting[me] = time.monotonic() + timeout_s
            try:
                get_hub().wait(watcher)
            finally:
                self._waiting.pop(me, None)
            try:
                return sock._sock.recv(RECEIVE_BYTES)  # type: ignore[no-any-return]
            except BlockingIOError:
                continue  # somebody else has read it, or the kernel dropped it

    def _patrol(self) -> NoReturn:
        while True:
            gevent.sleep(PATROL_EVERY_S)
            now = time.monotonic()
            for greenlet, deadline in list(self._waiting.items()):
                if deadline < now:
                    get_hub().loop.run_callback(self._end, greenlet, deadline)

    def _end(self, greenlet: Any, deadline: float) -> None:
        # It may have received, and wait again, in the meantime.
        if self._waiting.get(greenlet) == deadline:
            greenlet.throw(TimeoutError("timed out"))
