"""A kept-alive HTTP/1.1 client over plain or TLS sockets, whose answers are passed on as they come.

It runs unchanged on threads and, in the queen, on gevent's patched sockets. One `Upstream` is one address.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import httptools

from rbee.errors import Busy, TimedOut, Unreachable, WorkerLost
from rbee.http.tls import reason

RECEIVE_BYTES = 65536
MAX_IDLE = 512
MAX_STARTS = 32
MAX_HEAD_BYTES = 65536
KEEPALIVE_AFTER_S, KEEPALIVE_EVERY_S, KEEPALIVE_PROBES = 5, 5, 4
UNHEARD_FOR_S = 20.0
"""How long the other machine may acknowledge nothing (RFC 5482) before its connection is given up.

Its kernel acknowledges while a process there is busy or stopped: only a machine or a network that is gone does not.
"""
OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS})
"""What keeps a connection from being made that is no fault of the other side."""


def receive(sock: socket.socket, timeout_s: float | None) -> bytes:
    """Return what came next, b"" at the end. Raises: OSError; TimeoutError without a number when nothing came."""
    sock.settimeout(timeout_s)
    return sock.recv(RECEIVE_BYTES)


class Upstream:
    """A pool of kept-alive connections to `http://host:port`, `https://host:port` or `unix:/path`.

    `tls` says whom `https` trusts (`tls.client_context` of the fleet's authority); without it, whom the machine trusts.
    `base_path` stands in the place of the `/v1` that paths begin with. `receive` is how bytes are waited for; a program
    in which very many wait may put its own in the class.
    """

    receive: Callable[[socket.socket, float | None], bytes] = staticmethod(receive)

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        connect_timeout_s: float = 2.0,
        tls: ssl.SSLContext | None = None,
        base_path: str = "/v1",
    ) -> None:
        self.url = url
        self.token = token
        self._connect_timeout_s = connect_timeout_s
        self._base_path = "" if base_path == "/v1" else base_path
        self._starts: dict[tuple[str, str, str], str] = {}
        self._tls: ssl.SSLContext | None = None
        self._idle: deque[socket.socket] = deque(maxlen=MAX_IDLE)
        if url.startswith("unix:"):
            self._unix: str | None = url.removeprefix("unix:")
            self._host, self._port = "localhost", 0
        else:
            parts = urlsplit(url)
            self._unix = None
            self._host, self._port = (
                parts.hostname or "127.0.0.1",
                parts.port or (443 if parts.scheme == "https" else 80),
            )
            if parts.scheme == "https":
                self._tls = tls or ssl.create_default_context()

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Mapping[str, str] = {},
        timeout_s: float | None = 30.0,
        wait: Callable[[Answer], None] | None = None,
    ) -> Answer:
        """Send a request and return its answer once the head is there.

        `timeout_s` bounds the wait for the first byte. `wait` is called before every receive, of head and body: it may
        poll the answer beside other descriptors, and ends the exchange by raising anything but OSError.
        Raises: Unreachable (nothing was sent), WorkerLost (the connection closed before the head), TimedOut; Busy when
        this process has no descriptor left.
        """
        message = self._head(method, path, headers, len(body)) + body
        kept = True
        while True:
            # A kept connection may fail once; the second is a new one, or a job could be sent again and again.
            kept, sock = self._take() if kept else (False, self._connect())
            answer = Answer(self, sock, wait)
            try:
                sock.settimeout(timeout_s)
                send_all(sock, message)
                answer.read_head(timeout_s)
            except TimeoutError as problem:
                answer.close()
                if problem.errno is not None:
                    raise WorkerLost(f"{self.url} acknowledges nothing any more ({problem})") from None
                raise TimedOut(f"{self.url}{path} did not answer within {timeout_s:g} s") from None
            except (OSError, httptools.HttpParserError) as problem:
                answer.broken_off = answer.closed
                answer.close()
                # A server may close a kept connection just as it is used; it has not read the request then.
                if kept and not answer.touched and not answer.broken_off:
                    kept = False
                    continue
                raise WorkerLost(f"{self.url} closed the connection before it answered ({problem})") from None
            except BaseException:
                answer.close()
                raise
            return answer

    def give_back(self, sock: socket.socket) -> None:
        """Keep a connection whose answer was read to its end."""
        if len(self._idle) < MAX_IDLE:
            self._idle.append(sock)
        else:
            sock.close()

    def lost_idle(self) -> bool:
        """Return True when the other side has closed a kept connection: most likely its process has ended."""
        return any(_readable(sock) for sock in tuple(self._idle))

    def connect(self) -> None:
        """Make one more connection, to be used later: the kernel of a machine that is there answers at once.

        Raises: Unreachable; Busy when this process has no descriptor left.
        """
        self.give_back(self._connect())

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    def __del__(self) -> None:
        # For those who drop it without a word; a socket that is collected warns of that.
        if hasattr(self, "_idle"):
            self.close()

    def _take(self) -> tuple[bool, socket.socket]:
        while self._idle:
            try:
                sock = self._idle.pop()
            except IndexError:  # another thread took the last one
                break
            if not _readable(sock):
                return True, sock
            sock.close()
        return False, self._connect()

    def _connect(self) -> socket.socket:
        try:
            if self._unix is not None:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.settimeout(self._connect_timeout_s)
                try:
                    sock.connect(self._unix)
                except BaseException:
                    sock.close()
                    raise
                return sock
            sock = socket.create_connection((self._host, self._port), timeout=self._connect_timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            notice_silence(sock)
        except OSError as problem:
            if problem.errno in OURS:
                raise Busy(f"No connection to {self.url} can be made here ({problem.strerror})") from None
            raise Unreachable(f"Nothing answers at {self.url} ({problem})") from None
        return self._secured(sock, self._tls) if self._tls else sock

    def _secured(self, sock: socket.socket, tls: ssl.SSLContext) -> socket.socket:
        try:
            return tls.wrap_socket(sock, server_hostname=self._host)
        except OSError as problem:
            raise Unreachable(f"No safe connection to {self.url}: {reason(problem)}") from None

    def _head(self, method: str, path: str, headers: Mapping[str, str], length: int) -> bytes:
        start = self._starts.get((method, path, self.token)) or self._start(method, path)
        sized = f"Content-Length: {length}\r\n" if length or method in ("POST", "PUT", "PATCH") else ""
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        return f"{start}{sized}{lines}\r\n".encode("latin-1")

    def _start(self, method: str, path: str) -> str:
        """Return the lines that are the same for every request to a path; those of the latest paths are kept."""
        target = self._base_path + path[3:] if self._base_path and path.startswith("/v1/") else path
        host = f"{self._host}:{self._port}" if self._port else "localhost"
        start = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n"
        if self.token:
            start += f"Authorization: Bearer {self.token}\r\n"
        if len(self._starts) >= MAX_STARTS:
            self._starts.clear()
        self._starts[method, path, self.token] = start
        return start


class Answer:
    """One response: its head at once, its body as it comes."""

    def __init__(self, upstream: Upstream, sock: socket.socket, wait: Callable[[Answer], None] | None = None) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.touched = False
        self.broken_off = False
        self._upstream = upstream
        self._sock = sock
        self._wait = wait
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._head_done = False
        self._done = False
        self._keep = False
        self.closed = False
        self._head_bytes = 0

    # httptools calls these
    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._head_done = self.status >= 200

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)

    def on_message_complete(self) -> None:
        self._done = self._head_done
        # llhttp forgets it as soon as the message is complete.
        self._keep = self._parser.should_keep_alive()

    def read_head(self, timeout_s: float | None) -> None:
        """Receive until the head is whole."""
        while not self._head_done:
            self._await()
            data = self._upstream.receive(self._sock, timeout_s)
            if not data:
                raise ConnectionResetError("end of stream")
            self.touched = True
            self._head_bytes += len(data)
            self._parser.feed_data(data)
            if not self._head_done and self._head_bytes > MAX_HEAD_BYTES:
                raise httptools.HttpParserError("the head is too large")

    def next(self, timeout_s: float | None) -> bytes:
        """Return the next bytes of the body, or b"" at its end.

        Raises: TimeoutError when nothing came within `timeout_s`; WorkerLost when the connection closed early.
        """
        while True:
            if self._parts:
                data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                self._parts.clear()
                if self._done:
                    self._finish()
                return data
            if self._done:
                self._finish()
                return b""
            self._receive(timeout_s)

    def read(self, limit_bytes: int = 64 * 1024 * 1024, timeout_s: float | None = 30.0) -> bytes:
        """Return the whole rest of the body. Raises: WorkerLost, TimedOut, ValueError over the limit."""
        parts, size = [], 0
        try:
            while data := self.next(timeout_s):
                size += len(data)
                if size > limit_bytes:
                    raise ValueError(f"{self._upstream.url} answered more than {limit_bytes} bytes")
                parts.append(data)
        except TimeoutError:
            raise TimedOut(f"{self._upstream.url} stopped in the middle of its answer") from None
        finally:
            self.close()
        return b"".join(parts)

    def close(self) -> None:
        """End the exchange; an answer not read to its end closes the connection, which cancels the job there.

        Safe from another thread or greenlet: a `next` that waits elsewhere ends with WorkerLost.
        """
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait for it beside others."""
        return self._sock.fileno()

    def _await(self) -> None:
        # TLS keeps decrypted bytes of its own, which a poll of the socket does not see.
        if self._wait is not None and not (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending()):
            self._wait(self)

    def _receive(self, timeout_s: float | None) -> None:
        self._await()
        try:
            data = self._upstream.receive(self._sock, timeout_s)
        except (OSError, ValueError) as problem:
            # The kernel's own ETIMEDOUT, of a connection that it gave up, is a TimeoutError as well.
            if isinstance(problem, TimeoutError) and problem.errno is None:
                raise
            self.close()
            raise WorkerLost(f"{self._upstream.url} broke off its answer ({problem})") from None
        try:
            if data:
                self._parser.feed_data(data)
            elif not self._ends_with_connection():
                raise httptools.HttpParserError("end of stream")
            else:
                self._done = True
        except httptools.HttpParserError as problem:
            self.close()
            raise WorkerLost(f"{self._upstream.url} broke off its answer ({problem})") from None

    def _ends_with_connection(self) -> bool:
        """RFC 9112 6.3: without a length and chunks, a body ends where the connection does."""
        return "content-length" not in self.headers and "chunked" not in self.headers.get("transfer-encoding", "")

    def _finish(self) -> None:
        if self.closed:
            return
        if self._keep and not self._ends_with_connection():
            self.closed = True
            self._upstream.give_back(self._sock)
        else:
            self.close()


def notice_silence(sock: socket.socket, unheard_for_s: float = UNHEARD_FOR_S) -> None:
    """Have the kernel end a connection whose other side acknowledges nothing for so long, in use or idle (tcp(7))."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # macOS has other names for some, and none for the last.
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_AFTER_S),
        ("TCP_KEEPINTVL", KEEPALIVE_EVERY_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", int(unheard_for_s * 1000)),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def send_all(sock: socket.socket, data: bytes) -> None:
    """Send everything. What fits into the kernel's buffer, which most does, takes one call. Raises: OSError."""
    # gevent's sockets wrap one that never waits.
    inner: socket.socket | None = getattr(sock, "_sock", None)
    if inner is None or isinstance(sock, ssl.SSLSocket):
        sock.sendall(data)
        return
    try:
        sent = inner.send(data)
    except BlockingIOError:
        sent = 0
    if sent < len(data):
        sock.sendall(memoryview(data)[sent:])


def _readable(sock: socket.socket) -> bool:
    """A kept connection that has bytes or an end to read is of no more use."""
    inner: socket.socket | None = getattr(sock, "_sock", None)
    if inner is None:
        poller = select.poll()
        poller.register(sock.fileno(), select.POLLIN)
        return bool(poller.poll(0))
    # gevent's poll takes ten times as long as a look by itself.
    try:
        inner.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
