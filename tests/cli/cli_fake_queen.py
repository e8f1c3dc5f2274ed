"""A queen that says what a test tells it to, over the real HTTP server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rbee.errors import RbeeError
from rbee.http.server import Request, Response, Routes, Server


def chunk(text: str = "", **more: object) -> bytes:
    """Return one piece of a streamed answer."""
    event = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **more}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


END = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


Answering = Callable[[Request], Iterator[bytes]]


@dataclass
class FakeQueen:
    """Answers `/v1/chat/completions` with `answer(request)`, and keeps the requests."""

    answer: Answering
    requests: list[Request] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        routes = Routes()
        routes.add("POST", "/v1/chat/completions", self._chat)
        self.server = Server("127.0.0.1", 0, routes)
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.server.start()

    def asked(self) -> dict[str, object]:
        """Return the body of the last request."""
        body: dict[str, object] = json.loads(self.requests[-1].body)
        return body

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _chat(self, request: Request) -> Response:
        self.requests.append(request)
        pieces = self.answer(request)
        first = next(pieces)  # an error that is raised here becomes a status
        headers = {"X-Rbee-Job": "job_1", "X-Rbee-Worker": "here/w1"}
        return Response(self._stream(first, pieces), content_type="text/event-stream", headers=headers)

    def _stream(self, first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
        try:
            yield first
            yield from rest
        except GeneratorExit:
            self.cancelled.set()
            raise


def whole(*texts: str) -> Answering:
    """Return an answer that says these texts and ends well."""

    def answer(request: Request) -> Iterator[bytes]:
        for text in texts:
            yield chunk(text)
        yield b'data: {"choices": [], "usage": ' + json.dumps(USAGE).encode() + b"}\n\n"
        yield END

    return answer


def refused(error: RbeeError) -> Answering:
    """Return an answer that is an error."""

    def answer(request: Request) -> Iterator[bytes]:
        if request.path:
            raise error
        yield b""

    return answer
