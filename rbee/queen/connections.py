"""The clients' connections of a server process: gunicorn accepts and parses, one write answers.

gunicorn's own way from a parsed request to an answer takes as long as everything that the queen does in between: two
writes, a timer, and two dozen look-ups of settings that never change. Here an answer's head leaves with the first bytes
of its body, and idle connections are ended by one look a second.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import socket
import time
from collections.abc import Iterable
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from types import TracebackType
from typing import Any
from urllib.parse import unquote_to_bytes

import gevent
from gevent import getcurrent
from gunicorn.http.errors import NoMoreData
from gunicorn.http.wsgi import base_environ
from gunicorn.workers.ggevent import GeventWorker

from rbee.errors import Busy, RbeeError
from rbee.http.upstream import notice_silence, send_all
from rbee.queen.http_parser import BadFraming, StrictParser, StrictRequest
from rbee.wire.errors import encode_error

log = logging.getLogger("rbee.queen")

MAX_CONNECTIONS = 4096
NOTHING_TAKEN_S = 30.0
"""How long a client may take nothing of its answer (RFC 5482) before its connection is cut."""
RECEIVE_BYTES = 65536
BODILESS = frozenset({"204", "304"})
LENGTH_CHARS = len("content-length")


NEW_S = 1.0
"""How long a connection that sends nothing counts as one that has just come."""


class IdleEnd(BaseException):
    """A connection that waits for a request is to end; it never leaves the wait."""


class Idle:
    """The connections that wait for a request, the longest waiting first. It is entered around each wait."""

    def __init__(self) -> None:
        self._since: dict[Any, float] = {}
        self._ending: set[Any] = set()

    def __enter__(self) -> None:
        self._since[getcurrent()] = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, at: TracebackType | None
    ) -> bool:
        del self._since[getcurrent()]
        return kind is IdleEnd

    def end_longest(self) -> bool:
        """Close the connection that has waited longest. Return False when every one carries a request."""
        longest = next((greenlet for greenlet in self._since if greenlet not in self._ending), None)
        if longest is not None:
            self._end_soon(longest)
        return longest is not None

    def end_older(self, age_s: float) -> None:
        """Close the connections that have waited for so long."""
        before = time.monotonic() - age_s
        for greenlet, since in self._since.items():
            if since > before:
                break
            if greenlet not in self._ending:
                self._end_soon(greenlet)

    def longest_since(self) -> float:
        """Return since when the one waits that has waited longest (time.monotonic()), or infinity."""
        return next(iter(self._since.values()), float("inf"))

    def _end_soon(self, greenlet: Any) -> None:
        self._ending.add(greenlet)
        gevent.get_hub().loop.run_callback(self._end, greenlet)

    def _end(self, greenlet: Any) -> None:
        self._ending.discard(greenlet)
        # A request may have come in the meantime.
        if greenlet in self._since:
            greenlet.throw(IdleEnd)


class Input:
    """The body of a request, as WSGI reads it (PEP 3333, `wsgi.input`)."""

    def __init__(self, reader: Any, unreader: Any, *, empty: bool) -> None:
        # gunicorn's own object hands every KiB on by itself.
        self._reader = reader
        self._unreader = unreader
        self._empty = empty

    def read(self, size: int = RECEIVE_BYTES) -> bytes:
        """Return up to `size` bytes, b"" at the end of the body."""
        data: bytes = b"" if self._empty else self._reader.read(size)
        return data

    def here(self, length: int | None) -> bool:
        """Return True when a body of so many bytes came together with its head: to read it is not to wait."""
        return bool(length) and self._unreader.buf.tell() >= length


class Response:
    """One answer on its way to the client. It frames its body by its length, else in chunks (RFC 9112, 6)."""

    def __init__(self, sock: Any, request: Any, *, last: bool) -> None:
        self.close = last or request.should_close()
        self.begun = False
        self._sock = sock
        self._request = request
        self._old = request.version < (1, 1)
        self._bodiless = request.method == "HEAD"
        self._chunked = False
        self._head = b""

    def start(self, status: str, headers: Iterable[tuple[str, str]], problem: Any = None) -> None:
        """Take the head, which waits for the first bytes of the body (PEP 3333, `start_response`)."""
        if self.begun:
            raise problem[1] if problem else AssertionError("this answer has begun already")
        sized = False
        lines = [f"HTTP/1.1 {status}", f"Date: {_date()}", "Server: rbee"]
        for name, value in headers:
            sized = sized or (len(name) == LENGTH_CHARS and name.lower() == "content-length")
            lines.append(f"{name}: {value}")
        self._bodiless = self._bodiless or status[:3] in BODILESS
        self._chunked = not (sized or self._old or self._bodiless)
        # What was read of a body may have ended the connection: nobody knows where the next request begins.
        self.close = self.close or self._request.must_close or not (sized or self._chunked or self._bodiless)
        lines.append("Connection: close" if self.close else "Connection: keep-alive")
        if self._chunked:
            lines.append("Transfer-Encoding: chunked")
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
            raise ValueError("a header holds a line break")
        self._head = f"{head}\r\n\r\n".encode("latin-1")

    def write(self, data: bytes) -> None:
        """Send bytes of the body. Raises: OSError."""
        if self._bodiless or not data:
            return
        head = self._begin()
        if self._chunked:
            send_all(self._sock, b"%s%x\r\n%s\r\n" % (head, len(data), data))
        else:
            send_all(self._sock, head + data)

    def finish(self) -> None:
        """Send what is left. Raises: OSError."""
        rest = self._begin() + (b"0\r\n\r\n" if self._chunked else b"")
        if rest:
            send_all(self._sock, rest)

    def _begin(self) -> bytes:
        head, self._head, self.begun = self._head, b"", True
        return head


class Quick:
    """gunicorn's settings, each looked up once: they never change, and its own look-up is slow."""

    def __init__(self, settings: Any) -> None:
        self._settings = settings

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._settings, name)
        setattr(self, name, value)
        return value


class Request(StrictRequest):
    """A request as gunicorn parses it. No proxy is trusted to say who the client is or how it came."""

    def _peer_trusted_for_forwarded(self) -> tuple[dict[str, str], list[str]]:
        return {}, []


class Requests(StrictParser):
    """The requests of one connection."""

    mesg_class = Request


class Connections(GeventWorker):
    """Serves each connection to its end; one too many takes the place of an idle one, or is told so."""

    _idle: Idle
    _connected = 0
    _limit = MAX_CONNECTIONS
    _common: dict[str, Any]
    told_at: float | None = None
    """When this process was told to end (time.monotonic()); each request after that is the last of its connection."""
    earlier_requests = 0
    """Requests under way that came before that."""

    def init_process(self) -> None:
        self._idle = Idle()
        self._settings: Any = Quick(self.cfg)
        self._common = {
            **base_environ(self.cfg),
            "wsgi.multithread": True,
            "wsgi.url_scheme": "http",
            "SCRIPT_NAME": "",
        }
        super().init_process()

    def run(self) -> None:
        """Serve until told to end."""
        # What is there by now stays: a collection that looked at it again would hold every stream up for 20 ms. What a
        # request makes is mostly without cycles, so that to look for some every 700 objects finds none.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)
        super().run()

    def notify(self) -> None:
        """Called once a second."""
        super().notify()
        # Idle clients would hold up the end; the request of one that has just come is on its way.
        self._idle.end_older(self.cfg.keepalive if self.alive else NEW_S)

    def idle_since(self) -> float:
        """Return since when the connection waits that has waited longest (time.monotonic()), or infinity."""
        return self._idle.longest_since()

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        self._connected += 1
        try:
            client.setblocking(True)
            if self._connected > self._limit and not self._idle.end_longest():
                refuse(client, f"{self._limit} connections are open, which is the limit")
                return
            # The kernel tells a reader that takes nothing from one that is slow; a time for each write could not.
            if client.family != socket.AF_UNIX:
                notice_silence(client, NOTHING_TAKEN_S)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._serve(listener.getsockname(), client, addr)
        except OSError as problem:
            if problem.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF):
                log.exception("the connection of %s", addr)
        finally:
            self._connected -= 1
            with contextlib.suppress(OSError):
                client.close()

    def _serve(self, listener_name: Any, client: Any, addr: Any) -> None:
        """Answer the requests of one connection, one after the other. Raises: OSError."""
        requests, request = Requests(self._settings, client, addr), None
        try:
            while True:
                request = None
                with self._idle:
                    request = next(requests)
                if request is None:
                    return
                self.handle_request(listener_name, request, client, addr)
        except (StopIteration, NoMoreData):
            return
        except OSError:
            raise
        except Exception as problem:  # noqa: BLE001  a parser's word on what a client sent
            self.handle_error(request, client, addr, problem)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> bool:
        """Answer one request. Raises: StopIteration when the connection is to end, as gunicorn has it; OSError."""
        last = self.told_at is not None or not self.alive
        response = Response(sock, req, last=last)
        self.earlier_requests += not last
        try:
            body = self.wsgi(self._environ(req, sock, addr, listener_name), response.start)
            try:
                for data in body:
                    response.write(data)
                response.finish()
            finally:
                _close(body)
        except (gevent.GreenletExit, SystemExit):
            return True
        except TimeoutError:
            log.info("cut the connection of %s, which took nothing for %g s", addr, NOTHING_TAKEN_S)
            raise ConnectionResetError(errno.ECONNRESET, "the client takes nothing") from None
        except OSError:
            raise
        except Exception:
            if not response.begun:
                raise
            log.exception("an answer to %s broke off", addr)
            response.close = True
        finally:
            self.earlier_requests -= not last
        if response.close:
            raise StopIteration
        return True

    def _environ(self, req: Any, sock: Any, addr: Any, listener_name: Any) -> dict[str, Any]:
        """Return the request as WSGI has it (PEP 3333)."""
        if req._expected_100_continue:
            sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        req.unreader.mxchunk = RECEIVE_BYTES
        environ = self._common.copy()
        for name, value in req.headers:
            key = _key(name)
            environ[key] = f"{environ[key]},{value}" if key in environ else value
        path = req.path
        environ["PATH_INFO"] = unquote_to_bytes(path).decode("latin-1") if "%" in path else path
        environ["QUERY_STRING"] = req.query
        environ["RAW_URI"] = req.uri
        environ["REQUEST_METHOD"] = req.method
        environ["SERVER_PROTOCOL"] = "HTTP/1.1" if req.version == (1, 1) else "HTTP/1.0"
        environ["REMOTE_ADDR"], environ["REMOTE_PORT"] = _named(addr)
        environ["SERVER_NAME"], environ["SERVER_PORT"] = _named(listener_name)
        # Without a length or chunks a request has no body (RFC 9112, 6.3).
        empty = "CONTENT_LENGTH" not in environ and "HTTP_TRANSFER_ENCODING" not in environ
        environ["wsgi.input"] = Input(req.body.reader, req.unreader, empty=empty)
        environ["gunicorn.socket"] = sock
        environ["rbee.hang_up"] = req.force_close
        return environ

    def handle_error(self, req: Any, client: Any, addr: Any, problem: BaseException) -> None:
        """Answer what gunicorn's parser refuses; everything else keeps gunicorn's way."""
        with contextlib.suppress(OSError):
            if not isinstance(problem, RbeeError):
                told = "The request is not valid HTTP/1.1" if req is None else "The request could not be served"
                problem = BadFraming(told)
            body = encode_error(problem)
            status = HTTPStatus(problem.status)
            head = f"HTTP/1.1 {status:d} {status.phrase}\r\nConnection: close\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.log.debug("refused a request from %s: %r", addr, problem)


def refuse(client: Any, why: str) -> None:
    """Answer 503 on a connection of which no request was read."""
    body = encode_error(Busy(why, retry_after_s=1))
    head = "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Type: application/json"
    with contextlib.suppress(OSError):
        client.settimeout(1.0)
        client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        # A close with unread bytes resets the connection, and the answer is lost with it (RFC 9112, 9.6).
        client.shutdown(socket.SHUT_WR)
        client.recv(65536)


def _close(body: Iterable[bytes]) -> None:
    close = getattr(body, "close", None)
    if close is not None:
        close()


def _named(address: Any) -> tuple[str, str]:
    """Return an address' two parts; a Unix socket's has one, or none."""
    if isinstance(address, tuple):
        return address[0], str(address[1])
    return address.decode("utf-8", "replace") if isinstance(address, bytes) else address, ""


@lru_cache(maxsize=1024)
def _key(name: str) -> str:
    """Return what a header is called in the environ; gunicorn refuses those whose names hold an underscore."""
    key = name.replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"


_date_of = (0, "")


def _date() -> str:
    """Return the time as HTTP has it (RFC 9110, 5.6.7), made once a second."""
    global _date_of
    now = int(time.time())
    if _date_of[0] != now:
        _date_of = (now, formatdate(now, usegmt=True))
    return _date_of[1]
