"""Read a request's body within limits of size and time."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import TypeVar

import falcon
import msgspec
from gevent import Timeout

from rbee.errors import PayloadTooLarge, RequestTimeout
from rbee.wire.openai import MAX_BODY_BYTES, parse

BODY_TIMEOUT_S = 30.0
LINGER_BYTES = 16 * 1024 * 1024
LINGER_S = 1.0
PIECE_BYTES = 65536
T = TypeVar("T")


def read(req: falcon.Request, limit_bytes: int = MAX_BODY_BYTES) -> bytes:
    """Return the whole body. Raises: PayloadTooLarge, RequestTimeout."""
    return b"".join(pieces(req, limit_bytes))


def pieces(req: falcon.Request, limit_bytes: int) -> Iterator[bytes]:
    """Yield the body as it comes. Raises: PayloadTooLarge, RequestTimeout."""
    if (req.content_length or 0) > limit_bytes:
        _linger(req)
        raise PayloadTooLarge(limit_bytes)
    size = 0
    try:
        with Timeout(BODY_TIMEOUT_S):
            while data := req.stream.read(PIECE_BYTES):
                size += len(data)
                if size > limit_bytes:
                    _linger(req)
                    raise PayloadTooLarge(limit_bytes)
                yield data
    except Timeout:
        _hang_up(req)
        raise RequestTimeout(f"The request's body did not arrive within {BODY_TIMEOUT_S:g} s") from None


def read_json(req: falcon.Request, type_: type[T]) -> T:
    """Return the body, decoded and checked. Raises: InvalidRequest, PayloadTooLarge, RequestTimeout."""
    return parse(read(req), msgspec.json.Decoder(type_))


def _linger(req: falcon.Request) -> None:
    """Read on for a moment, so that a client that is still sending gets to read the refusal (RFC 9112, 9.6)."""
    with contextlib.suppress(Timeout, OSError), Timeout(LINGER_S):
        left = LINGER_BYTES
        while left > 0 and (data := req.stream.read(PIECE_BYTES)):
            left -= len(data)
    _hang_up(req)


def _hang_up(req: falcon.Request) -> None:
    """Have the server find the end of the connection after this answer, instead of the rest of the body."""
    sock = req.env.get("gunicorn.socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RD)
