"""Read a request's body within limits of size and time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TypeVar

import falcon
import msgspec
from gevent import Timeout

from rbee.errors import PayloadTooLarge, RequestTimeout
from rbee.queen.connections import Input
from rbee.wire.openai import MAX_BODY_BYTES, parse

BODY_TIMEOUT_S = 30.0
SLOWEST_BYTES_S = 16_384
"""A body may take so long, and longer by what has come of it at this pace: not what a connection is held with."""
LINGER_BYTES = 16 * 1024 * 1024
LINGER_S = 1.0
PIECE_BYTES = 65536
T = TypeVar("T")


def read(req: falcon.Request, limit_bytes: int = MAX_BODY_BYTES) -> bytes:
    """Return the whole body. Raises: PayloadTooLarge, RequestTimeout, InvalidInput."""
    return b"".join(pieces(req, limit_bytes))


def pieces(req: falcon.Request, limit_bytes: int) -> Iterator[bytes]:
    """Yield the body as it comes. Raises: PayloadTooLarge, RequestTimeout, InvalidInput."""
    length = req.content_length
    if (length or 0) > limit_bytes:
        _linger(req)
        raise PayloadTooLarge(limit_bytes)
    stream, size = Paced(req), 0
    while size != length and (data := stream.read(PIECE_BYTES)):
        size += len(data)
        if size > limit_bytes:
            _linger(req)
            raise PayloadTooLarge(limit_bytes)
        yield data


def read_json(req: falcon.Request, type_: type[T]) -> T:
    """Return the body, decoded and checked. Raises: InvalidRequest, PayloadTooLarge, RequestTimeout."""
    return parse(read(req), msgspec.json.Decoder(type_))


class Paced:
    """The body of a request that must keep coming, as a file to read from."""

    def __init__(self, req: falcon.Request) -> None:
        self._req = req
        self._deadline = time.monotonic() + BODY_TIMEOUT_S

    def read(self, size: int | None = None, /) -> bytes:
        """Return up to `size` bytes, b"" at the end. Raises: RequestTimeout, InvalidInput."""
        stream = self._req.stream
        if isinstance(stream, Input) and stream.here(self._req.content_length):
            return stream.read(size or PIECE_BYTES)
        try:
            with Timeout(max(0.0, self._deadline - time.monotonic())):
                data: bytes = stream.read(size or PIECE_BYTES)
        except Timeout:
            hang_up(self._req)
            raise RequestTimeout(f"The request's body came too slowly ({BODY_TIMEOUT_S:g} s and more)") from None
        self._deadline += len(data) / SLOWEST_BYTES_S
        return data


def hang_up(req: falcon.Request) -> None:
    """Have the server end the connection after this answer, instead of waiting for the rest of the body."""
    end = req.env.get("rbee.hang_up")
    if end is not None:
        end()


def _linger(req: falcon.Request) -> None:
    """Read on for a moment, so that a client that is still sending gets to read the refusal (RFC 9112, 9.6)."""
    with contextlib.suppress(Timeout, OSError), Timeout(LINGER_S):
        left = LINGER_BYTES
        while left > 0 and (data := req.stream.read(PIECE_BYTES)):
            left -= len(data)
    hang_up(req)
