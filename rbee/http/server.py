"""A small threaded HTTP/1.1 server for hives and workers (RFC 9110, 9112), over the standard library's.

One thread a connection, a bounded number of connections, bounded bodies, and an error in OpenAI's form for
everything that goes wrong.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import re
import select
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from rbee.errors import (
    AccessDenied,
    Busy,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    PortInUse,
    RbeeError,
    SetupProblem,
)
from rbee.wire.errors import encode_error
from rbee.wire.openai import MAX_BODY_BYTES, parse

log = logging.getLogger("rbee.http")

MAX_CONNECTIONS = 512
IDLE_TIMEOUT_S = 30.0
HANDSHAKE_TIMEOUT_S = 10.0
HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
LINGER_S, LINGER_BYTES = 5.0, 64 * 1024 * 1024
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
T = TypeVar("T")


@dataclass
class Request:
    """One request. `params` are the parts of the path that the route names."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    connection: socket.socket
    params: dict[str, str] = field(default_factory=dict)

    def json(self, type_: type[T]) -> T:
        """Decode and check the body. Raises: InvalidRequest."""
        return parse(self.body, msgspec.json.Decoder(type_))

    def require(self, token: str) -> None:
        """Check the bearer token in constant time. Raises: AccessDenied."""
        scheme, _, given = self.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise AccessDenied("This needs the token of this hive or worker", hint="the queen's address instead")

    def gone(self) -> bool:
        """Return True when the client has closed its side."""
        poller = select.poll()
        poller.register(self.connection.fileno(), select.POLLIN | HUNG_UP)
        events = dict(poller.poll(0)).get(self.connection.fileno(), 0)
        if not events:
            return False
        if isinstance(self.connection, ssl.SSLSocket) and events & HUNG_UP:
            return True  # the alert with which TLS says goodbye lies before the end of the stream
        try:
            # The plain method also on a TLS socket: only the end of the stream is asked for, no data.
            return socket.socket.recv(self.connection, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


@dataclass
class Response:
    """What a handler returns; a body that is no bytes is sent in chunks as it comes."""

    body: bytes | Iterable[bytes] = b""
    status: int = 200
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)


def reply(value: Any, status: int = 200) -> Response:
    """Return a response with `value` as JSON."""
    return Response(msgspec.json.encode(value), status)


Handler = Callable[[Request], Response]


class Routes:
    """Which handler answers which method and path; `{name}` stands for one segment."""

    def __init__(self) -> None:
        self._routes: list[tuple[str, re.Pattern[str], Handler]] = []

    def add(self, method: str, pattern: str, handler: Handler) -> None:
        """Add a route. Patterns are tried in the order in which they were added."""
        regex = re.compile("^" + re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(pattern)) + "$")
        self._routes.append((method, regex, handler))

    def find(self, method: str, path: str) -> tuple[Handler, dict[str, str]]:
        """Return the handler and the named segments. Raises: NotFound, MethodNotAllowed."""
        allowed = []
        for route_method, regex, handler in self._routes:
            match = regex.match(path)
            if match and route_method == ("GET" if method == "HEAD" else method):
                return handler, {name: unquote(value) for name, value in match.groupdict().items()}
            if match:
                allowed.append(route_method)
        if allowed:
            raise MethodNotAllowed(method, path, sorted(set(allowed)))
        raise NotFound(f"There is nothing at {path[:200]}")


class Server(ThreadingHTTPServer):
    """An HTTP server on `host:port` (port 0: any free one) or on `listener`, listening once it is made.

    Raises: PortInUse, SetupProblem.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        host: str,
        port: int,
        routes: Routes,
        *,
        tls: ssl.SSLContext | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        self.routes = routes
        self.turned_at = time.monotonic()
        """When the loop that accepts connections last came round (time.monotonic())."""
        self._tls = tls
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        if listener is not None:
            self._take(listener)
            return
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Connection)
        except OSError as problem:
            if problem.errno == errno.EADDRINUSE:
                raise PortInUse(host, port) from None
            raise SetupProblem(
                f"Cannot listen on {host}:{port} ({problem.strerror})", hint="another --host or --port"
            ) from None
        self.port: int = self.server_address[1]

    def _take(self, listener: socket.socket) -> None:
        """Serve on a socket that listens already; TCPServer's own start makes one, which a sandbox may forbid."""
        BaseServer.__init__(self, listener.getsockname(), _Connection)
        self.socket, self.address_family = listener, listener.family
        self.server_name = "rbee"
        address = listener.getsockname()
        self.port = self.server_port = address[1] if isinstance(address, tuple) else 0

    def service_actions(self) -> None:
        self.turned_at = time.monotonic()

    def server_bind(self) -> None:
        # HTTPServer's own asks the resolver for the host's name, which hangs where DNS is dead.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "rbee", self.server_address[1]

    def start(self) -> None:
        """Serve from a thread of its own."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, name="http", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            if self._tls is None:
                with contextlib.suppress(OSError):
                    request.sendall(_full())
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            if self._tls is not None:
                request.settimeout(HANDSHAKE_TIMEOUT_S)
                request = self._tls.wrap_socket(request, server_side=True)
            super().process_request_thread(request, client_address)
        except (OSError, ssl.SSLError) as problem:
            log.debug("connection from %s ended: %s", client_address, problem)
            self.shutdown_request(request)
        finally:
            self._places.release()

    def shutdown_request(self, request: Any) -> None:
        if isinstance(request, ssl.SSLSocket):
            # Say goodbye (RFC 8446, 6.1) and do not wait for an answer to it.
            with contextlib.suppress(OSError, ValueError):
                request.settimeout(0.0)
                request.unwrap()
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        problem = sys.exc_info()[1]
        if not isinstance(problem, OSError):
            log.error("connection from %s: %r", client_address, problem, exc_info=problem)


def _full() -> bytes:
    body = encode_error(Busy(f"{MAX_CONNECTIONS} connections are open, which is the limit"))
    head = "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Type: application/json"
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class _Connection(BaseHTTPRequestHandler):
    """One connection: requests one after the other until either side closes it."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = IDLE_TIMEOUT_S
    server_version, sys_version = "rbee", ""

    def handle_one_request(self) -> None:
        self._started = False
        try:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            self._answer()
        except TimeoutError:
            self.close_connection = True
        except (ConnectionError, ssl.SSLError):
            self.close_connection = True

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        try:
            request = self._request(path)
            handler, request.params = self.server.routes.find(self.command, path)
            self._send(handler(request))
        except RbeeError as problem:
            self._send_error(problem, path)
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            log.exception("%s %s failed", self.command, path)
            self._send_error(RbeeError("An internal error occurred; the log has the details"), path)

    def _request(self, path: str) -> Request:
        headers = {name.lower(): value for name, value in self.headers.items()}
        lengths = self.headers.get_all("content-length") or []
        chunked = "transfer-encoding" in headers
        if len(lengths) > 1 or len(self.headers.get_all("host") or []) > 1 or (chunked and lengths):
            # RFC 9112 6.3: two framings of one message are how requests are smuggled.
            self.close_connection = True
            raise InvalidRequest("The request has two lengths, two hosts, or a length and a transfer encoding")
        body = self._read_chunks() if chunked else self._read_exactly(lengths[0] if lengths else "0")
        query = parse_qs(urlsplit(self.path).query)
        return Request(self.command, path, query, headers, body, self.connection)

    def _read_exactly(self, length: str) -> bytes:
        if not length.isascii() or not length.isdigit():
            self.close_connection = True
            raise InvalidRequest("The Content-Length is no number")
        if int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            raise PayloadTooLarge(MAX_BODY_BYTES)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionResetError("the client left in the middle of its request")
        return body

    def _read_chunks(self) -> bytes:
        if self.headers["transfer-encoding"].strip().lower() != "chunked":
            self.close_connection = True
            raise InvalidRequest("The only transfer encoding taken here is chunked")
        parts, size = [], 0
        while True:
            line = self.rfile.readline(1024).split(b";")[0].strip()
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", line):
                self.close_connection = True
                raise InvalidRequest("A chunk of the request has no valid length")
            length = int(line, 16)
            size += length
            if size > MAX_BODY_BYTES:
                self.close_connection = True
                raise PayloadTooLarge(MAX_BODY_BYTES)
            if length == 0:
                break
            parts.append(self.rfile.read(length))
            self.rfile.readline(8)
        while self.rfile.readline(8192).strip():
            pass
        return b"".join(parts)

    def _send(self, response: Response) -> None:
        whole = response.body if isinstance(response.body, bytes) else None
        self._started = True
        self.send_response_only(response.status)
        self.send_header("Content-Type", response.content_type)
        for name, value in response.headers.items():
            self.send_header(name, value)
        if whole is not None:
            self.send_header("Content-Length", str(len(whole)))
        elif self.request_version >= "HTTP/1.1":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        if whole is not None:
            self.end_headers_into(b"" if self.command == "HEAD" else whole)
            return
        try:
            self.end_headers_into(b"")
            self._send_chunks(response.body)  # type: ignore[arg-type]  # not bytes here
        finally:
            # Also when the client left before the head: nobody else ends the work behind the body.
            close = getattr(response.body, "close", None)
            if close is not None:
                close()

    def end_headers_into(self, body: bytes) -> None:
        """Send the head and a whole body in one packet."""
        if self.close_connection:
            self.send_header("Connection", "close")
        self._headers_buffer.append(b"\r\n" + body)  # type: ignore[attr-defined]  # typeshed leaves it out
        self.flush_headers()

    def _send_chunks(self, chunks: Iterable[bytes]) -> None:
        chunked = self.request_version >= "HTTP/1.1"
        try:
            for data in chunks:
                if data:
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
            if chunked:
                self.wfile.write(b"0\r\n\r\n")
        except BaseException:
            # No last chunk: the client must see that the answer was cut, not that it ended.
            self.close_connection = True
            raise

    def _send_error(self, problem: RbeeError, path: str) -> None:
        if self._started:
            self.close_connection = True
            return
        headers = {}
        if isinstance(problem, MethodNotAllowed):
            headers["Allow"] = ", ".join(problem.allowed)
        if isinstance(problem, Busy):
            headers["Retry-After"] = str(max(1, round(problem.retry_after_s)))
        if isinstance(problem, AccessDenied) and problem.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        body = encode_error(problem, anthropic=path.startswith("/v1/messages"))
        self._send(Response(body, problem.status, headers=headers))
        if isinstance(problem, PayloadTooLarge):
            self._linger()

    def _linger(self) -> None:
        """Read away what a client still sends: a close with unread data resets the connection, and the answer is
        lost with it (RFC 9112, 9.6).
        """
        end, left = time.monotonic() + LINGER_S, LINGER_BYTES
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1.0)
            while left > 0 and time.monotonic() < end and (data := self.connection.recv(65536)):
                left -= len(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the standard library's parser refuses, in OpenAI's form."""
        self.close_connection = True
        self.request_version = "HTTP/1.1"
        problem = InvalidRequest(message or HTTPStatus(code).phrase)
        problem.status = code  # type: ignore[misc]  # the parser's own status
        self.command = getattr(self, "command", None) or "GET"
        self._send_error(problem, "")

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s " + format, self.address_string(), *args)


for _method in METHODS:
    setattr(_Connection, f"do_{_method}", _Connection._answer)
