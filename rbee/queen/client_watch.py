"""Notice at once that a client has left, without writing to it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from gevent import get_hub
from gevent.event import Event

from rbee.errors import DeadlineExceeded, RbeeError

READ = 1


class ClientGone(Exception):
    """The client closed its connection; nobody waits for this job's answer."""


class ClientWatch:
    """Watches the socket of one request from the event loop.

    The kernel reports the end of a connection as something to read. Bytes of a next, pipelined request look the same,
    and end the watch: whoever sends ahead is still there.
    A client that allowed only `timeout_s` is as good as gone after it: whatever waits for `gone` keeps the deadline.
    """

    def __init__(self, sock: socket.socket | None, timeout_s: float | None = None) -> None:
        self.gone = Event()
        self.expired = False
        self._timeout_s = timeout_s
        self._timer: Any = None
        self._problem: RbeeError | None = None
        self._sock = sock
        self._on_gone: Callable[[], None] | None = None
        self._io: Any = None
        if sock is not None:
            self._io = get_hub().loop.io(sock.fileno(), READ)
            self._io.start(self._readable)
        if timeout_s is not None:
            self._timer = get_hub().loop.timer(timeout_s)
            self._timer.start(self._expire)

    def check(self) -> None:
        """Raise ClientGone when the client has left, DeadlineExceeded when its time is over, or what `end` was told."""
        if self._problem is not None:
            raise self._problem
        if self.expired:
            raise DeadlineExceeded(f"The request was not done within its {self._timeout_s:g} s (X-Request-Timeout)")
        if self.gone.is_set():
            raise ClientGone

    def why(self, problem: RbeeError) -> RbeeError:
        """Return what really ended an exchange that broke off with `problem`. Raises: ClientGone."""
        try:
            self.check()
        except RbeeError as real:
            return real
        return problem

    def call_when_gone(self, callback: Callable[[], None] | None) -> None:
        """Have `callback` called in the event loop when the client leaves; it must not wait for anything."""
        self._on_gone = callback
        if callback is not None and self.gone.is_set():
            callback()

    def leave(self) -> None:
        """End the job as if its client had left: somebody cancelled it by its id."""
        callback = self._on_gone
        self.close()
        self.gone.set()
        if callback is not None:
            callback()

    def cut(self) -> None:
        """Break off what is under way for this client, who waits on."""
        if self._on_gone is not None:
            self._on_gone()

    def end(self, problem: RbeeError) -> None:
        """End the job with a problem that its client is told."""
        self._problem = problem
        self.leave()

    def close(self) -> None:
        """End the watch. The socket may carry a next request after this."""
        self._on_gone = None
        if self._io is not None:
            self._io.stop()
            self._io.close()
            self._io = None
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None

    def _expire(self) -> None:
        self.expired = True
        self.leave()

    def _readable(self) -> None:
        assert self._sock is not None
        try:
            ended = socket.socket.recv(self._sock, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return
        except OSError:
            ended = True
        callback = self._on_gone
        self.close()
        if ended:
            self.gone.set()
            if callback is not None:
                callback()
