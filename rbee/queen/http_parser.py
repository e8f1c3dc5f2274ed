"""The parsing of clients' requests: gunicorn's, made strict where its C parser is lenient, and bounded in time.

What two parsers on a request's way read differently is how one request is smuggled inside another (RFC 9112, 11.2), so
whatever is doubtful is refused and its connection closed.
"""

from __future__ import annotations

import time
from typing import Any, NoReturn

import gevent
from gunicorn.http.body import ChunkedReader
from gunicorn.http.message import Request
from gunicorn.http.parser import RequestParser
from gunicorn.http.unreader import SocketUnreader

from rbee.errors import InvalidInput, RequestTimeout

HEAD_TIMEOUT_S = 10.0
"""From a request's first byte to the end of its head."""
MAX_HEAD_BYTES = 65_536
MAX_DRAIN_BYTES = 4 * 1024 * 1024
"""So much of a body that nobody read is received for the sake of the connection; past it the connection ends."""
MAX_CHUNK_LINE_BYTES = 256
MAX_TRAILER_BYTES = 8192
RECEIVES_A_TURN, CHUNKS_A_TURN = 16, 1024
HEX = frozenset(b"0123456789abcdefABCDEF")


class BadFraming(InvalidInput):
    """A request's bytes are not valid HTTP/1.1, or could be read in two ways."""

    code = "bad_request"


class FairUnreader(SocketUnreader):
    """Receives, and lets others run: a receive does not wait while a client sends faster than it is read."""

    def __init__(self, sock: Any) -> None:
        super().__init__(sock)
        self._reads = 0

    def chunk(self) -> bytes:
        """Return what came next, b"" at the end."""
        self._reads += 1
        if self._reads % RECEIVES_A_TURN == 0:
            gevent.sleep(0)
        data: bytes = self.sock.recv(self.mxchunk)
        return data


class StrictRequest(Request):
    """A request whose head arrives in time and reads the same to every parser."""

    unreader: Any
    _head_by = 0.0

    def parse(self, unreader: Any) -> Any:
        self.max_buffer_headers = MAX_HEAD_BYTES
        return super().parse(unreader)

    def read_into(self, unreader: Any, buf: Any, stop: bool | None = False) -> None:
        if stop:  # the wait for a request to begin
            super().read_into(unreader, buf, stop)
            return
        self._head_by = self._head_by or time.monotonic() + HEAD_TIMEOUT_S
        late = RequestTimeout(f"The request's head did not arrive within {HEAD_TIMEOUT_S:g} s")
        with gevent.Timeout(max(0.0, self._head_by - time.monotonic()), late):
            super().read_into(unreader, buf)

    def _parse_fast(self, unreader: Any, buf: bytearray) -> bytes:
        rest: bytes = super()._parse_fast(unreader, buf)  # type: ignore[misc]  # the stubs lack it
        # `read_into` has extended the buffer in its place: it holds the head, and after it the rest.
        self._check(bytes(buf[: len(buf) - len(rest)]))
        return rest

    def _check(self, head: bytes) -> None:
        """Refuse what the C parser takes and RFC 9112 (2.2, 3.2, 5.2) does not. Raises: BadFraming."""
        if head.count(b"\n") != head.count(b"\r\n"):
            raise BadFraming("A line of the request's head does not end with CR LF")
        if b"\n " in head or b"\n\t" in head:
            raise BadFraming("A header of the request is folded over two lines")
        if self.version != (1, 0) and b"\nhost:" not in head.lower():
            raise BadFraming("The request has no Host header")

    def set_body_reader(self) -> None:
        super().set_body_reader()
        body: Any = self.body
        if isinstance(body.reader, ChunkedReader):
            body.reader = Chunks(self)


class Chunks:
    """A chunked body (RFC 9112, 7.1); extensions and trailers are passed over."""

    def __init__(self, request: StrictRequest) -> None:
        self._request = request
        self._unreader = request.unreader
        self._data = b""
        self._at = 0
        self._left = 0
        self._count = 0
        self._ended = False

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, b"" at the end of the body. Raises: BadFraming."""
        parts: list[bytes] = []
        while size > 0 and not self._ended:
            if self._left == 0 and not self._next_chunk():
                break
            if self._at == len(self._data):
                self._receive()
            part = self._data[self._at : self._at + min(size, self._left)]
            self._at += len(part)
            self._left -= len(part)
            size -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _next_chunk(self) -> bool:
        """Read the line before a chunk, and the one that ends the chunk before it. Return False after the last."""
        if self._count and self._line(2):
            self._refuse("A chunk of the request's body is longer than it says")
        self._count += 1
        if self._count % CHUNKS_A_TURN == 0:
            gevent.sleep(0)
        digits, _, extension = self._line(MAX_CHUNK_LINE_BYTES).partition(b";")
        digits = digits.rstrip(b" \t") if extension else digits
        if not 0 < len(digits) <= 16 or not HEX.issuperset(digits):
            self._refuse("The length of a chunk of the request's body is no hexadecimal number")
        self._left = int(digits, 16)
        if self._left == 0:
            self._end()
        return not self._ended

    def _end(self) -> None:
        left = MAX_TRAILER_BYTES
        while line := self._line(left):
            left -= len(line)
        self._ended = True
        self._unreader.unread(self._data[self._at :])

    def _line(self, limit_bytes: int) -> bytes:
        """Return the next line without its end."""
        while (end := self._data.find(b"\r\n", self._at, self._at + limit_bytes)) < 0:
            if len(self._data) - self._at >= limit_bytes:
                self._refuse("The chunks of the request's body are not valid")
            self._receive()
        line = self._data[self._at : end]
        if b"\r" in line or b"\n" in line:
            self._refuse("A line among the chunks of the request's body does not end with CR LF")
        self._at = end + 2
        return line

    def _receive(self) -> None:
        data = self._unreader.read()
        if not data:
            self._refuse("The request's body ended before its last chunk")
        self._data = self._data[self._at :] + data
        self._at = 0

    def _refuse(self, why: str) -> NoReturn:
        # Where the next request begins is not known any more.
        self._request.force_close()
        self._ended = True
        raise BadFraming(why)


class StrictParser(RequestParser):
    """The requests of one connection."""

    mesg_class = StrictRequest
    unreader: Any

    def __init__(self, cfg: Any, source: Any, source_addr: Any) -> None:
        super().__init__(cfg, source, source_addr)
        self.unreader = FairUnreader(source)

    def finish_body(self, deadline: Any = None, max_bytes: Any = None) -> Any:
        """Pass over what nobody read of the last body. Raises: StopIteration when that is too much."""
        if self.mesg is None:
            return True
        if self.unreader.buf.tell():
            # Requests that were sent together are answered one after the other, and so are those of others.
            gevent.sleep(0)
        whole: Any = super().finish_body(max_bytes=MAX_DRAIN_BYTES)
        if not whole:
            raise StopIteration
        return True
