"""The client of queen, hive and worker: typed calls and event streams."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from rbee.errors import RbeeError, TimedOut
from rbee.http.upstream import Answer, Upstream
from rbee.wire.errors import decode_error

T = TypeVar("T")


class Client:
    """Calls to one program at `url`, with its bearer token; `tls` is whom an `https` address must be trusted by."""

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        timeout_s: float = 10.0,
        connect_timeout_s: float = 2.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._upstream = Upstream(self.url, token=token, connect_timeout_s=connect_timeout_s, tls=tls)

    def get(self, path: str, type_: type[T], *, timeout_s: float | None = None) -> T:
        """GET and decode. Raises: RbeeError of the family that the answer's status stands for."""
        return self._decode(self.send("GET", path, timeout_s=timeout_s), type_)

    def post(self, path: str, value: Any, type_: type[T], *, timeout_s: float | None = None) -> T:
        """POST `value` as JSON and decode the answer."""
        return self._decode(self.send("POST", path, value, timeout_s=timeout_s), type_)

    def delete(self, path: str, type_: type[T], *, timeout_s: float | None = None) -> T:
        """DELETE and decode the answer."""
        return self._decode(self.send("DELETE", path, timeout_s=timeout_s), type_)

    def send(
        self,
        method: str,
        path: str,
        value: Any = None,
        *,
        timeout_s: float | None = None,
        headers: Mapping[str, str] = {},
    ) -> Answer:
        """Send a request and return the answer's head; a status of 400 and above raises."""
        body = b"" if value is None else msgspec.json.encode(value)
        headers = {**headers, **({"Content-Type": "application/json"} if body else {})}
        wait_s = self._timeout_s if timeout_s is None else timeout_s
        answer = self._upstream.request(method, path, body, headers=headers, timeout_s=wait_s)
        if answer.status >= 400:
            nothing = f"{self.url} answered {answer.status} and nothing else. Try: is it rbee that listens there?"
            raise decode_error(answer.status, answer.read(1_000_000, wait_s).strip() or nothing.encode())
        return answer

    def close(self) -> None:
        """Close the kept connections."""
        self._upstream.close()

    def _decode(self, answer: Answer, type_: type[T]) -> T:
        body = answer.read(timeout_s=self._timeout_s)
        try:
            return msgspec.json.decode(body or b"null", type=type_)
        except msgspec.DecodeError as problem:
            raise RbeeError(f"{self.url} gave an answer that is not understood ({problem})") from None


def events(answer: Answer, *, silence_s: float = 60.0) -> Iterator[str]:
    """Yield the data of each server-sent event (WHATWG HTML, 9.2); comments are skipped.

    Raises: WorkerLost when the stream breaks, TimedOut when nothing comes for `silence_s`.
    """
    rest = b""
    try:
        while data := answer.next(silence_s):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip().decode()
    except TimeoutError:
        raise TimedOut(f"nothing came for {silence_s:g} s") from None
    finally:
        answer.close()
