"""The thin relay before a serving engine: bytes flow through, errors are put into one form."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlencode

from rbee.errors import Lost, RbeeError, TimedOut, WorkerLost
from rbee.http.server import Request, Response
from rbee.http.upstream import Answer, Upstream
from rbee.wire.errors import decode_error, encode_error
from rbee.worker.assembly import Assembly, asked_as_stream
from rbee.worker.shapes import Events, complete, events_of

ANSWER_TIMEOUT_S = 3600.0
"""The longest silence: a job may wait for a slot behind long ones. A dead engine is noticed at once by its socket."""
METRICS_TIMEOUT_S = 2.0
MAX_ERROR_BYTES = 1024 * 1024
MAX_BODY_BYTES = 256 * 1024 * 1024
MAX_EVENT_BYTES = 8 * 1024 * 1024
HUNG_UP = getattr(select, "POLLRDHUP", select.POLLIN)
PASSED_ON = ("accept", "content-type", "anthropic-version", "anthropic-beta")


class ClientLeft(Exception):
    """The client closed its connection. No OSError, so that nobody takes it for the engine's."""


@dataclass
class Watch:
    """Waits for the engine beside the client's connection and the end of this worker."""

    request: Request
    ending_fd: int

    def __call__(self, answer: Answer) -> None:
        """Return when the engine has sent something.

        Raises: ClientLeft, WorkerLost when this worker ends, TimedOut.
        """
        poller = select.poll()
        poller.register(answer.fileno(), select.POLLIN)
        poller.register(self.ending_fd, select.POLLIN)
        client = self.request.connection.fileno()
        poller.register(client, HUNG_UP)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            ready = dict(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if client in ready:
                if self.request.gone():
                    raise ClientLeft
                poller.modify(client, 0)  # it sent its next request already; an error is still told
            elif answer.fileno() in ready:
                return
            elif self.ending_fd in ready:
                raise WorkerLost("The worker was stopped before its answer was whole", hint="the same request again")
            elif not ready:
                raise TimedOut(f"The engine was silent for {ANSWER_TIMEOUT_S:g} s")


def relay(upstream: Upstream, request: Request, ending_fd: int, *, whole_as_stream: bool = False) -> Response:
    """Send a request on to the engine and return its answer, whole or as it comes.

    `whole_as_stream` asks the engine for a stream and puts it together, for an engine that cancels only streams.
    Raises: UpstreamError with the engine's own words, WorkerLost when it died before the first byte, ClientLeft.
    """
    watch = Watch(request, ending_fd)
    body, assembly = request.body, None
    if whole_as_stream and (asked := asked_as_stream(request.path, request.body)):
        body, assembly = asked
    headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
    path = f"{request.path}?{urlencode(request.query, doseq=True)}" if request.query else request.path
    answer = upstream.request(request.method, path, body, headers=headers, timeout_s=ANSWER_TIMEOUT_S, wait=watch)
    try:
        if answer.status >= 400:
            raise decode_error(answer.status, answer.read(MAX_ERROR_BYTES, ANSWER_TIMEOUT_S))
        content_type = answer.headers.get("content-type", "application/json")
        if assembly is not None and content_type.startswith("text/event-stream"):
            return Response(complete(request.path, request.body, _assembled(answer, assembly), time.time()))
        if not content_type.startswith("text/event-stream"):
            whole = answer.read(MAX_BODY_BYTES, ANSWER_TIMEOUT_S)
            return Response(complete(request.path, request.body, whole, time.time()), answer.status, content_type)
        first = answer.next(ANSWER_TIMEOUT_S)
    except BaseException:
        answer.close()
        raise
    headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
    completed = events_of(request.path, request.body, time.time)
    events = stream(answer, first, completed or bytes, anthropic=request.path.startswith("/v1/messages"))
    return Response(events, answer.status, content_type, headers)


def _assembled(answer: Answer, assembly: Assembly) -> bytes:
    try:
        while data := answer.next(ANSWER_TIMEOUT_S):
            assembly.feed(data)
    finally:
        answer.close()
    return assembly.whole()


def engine_metrics(upstream: Upstream, timeout_s: float = METRICS_TIMEOUT_S) -> bytes:
    """Return the engine's own Prometheus metrics, or nothing where it has none."""
    try:
        answer = upstream.request("GET", "/metrics", timeout_s=timeout_s)
        text = answer.read(MAX_ERROR_BYTES, timeout_s)
    except (RbeeError, ValueError):
        return b""
    return text if answer.status == 200 and answer.headers.get("content-type", "").startswith("text/plain") else b""


def stream(answer: Answer, first: bytes, completed: Events, *, anthropic: bool) -> Iterator[bytes]:
    """Yield whole events as they come; an engine that dies leaves a typed error event and no `[DONE]`.

    Only whole events are passed on, so that the error stands on lines of its own. `completed` sees each of them.
    """
    rest = b""
    try:
        data = first
        while data:
            rest += data
            end = _whole(rest)
            if end:
                yield completed(rest[:end])
                rest = rest[end:]
            elif len(rest) > MAX_EVENT_BYTES:
                raise WorkerLost("The engine sent an event that does not end")
            data = answer.next(ANSWER_TIMEOUT_S)
        if rest:
            yield rest
    except (Lost, TimeoutError) as problem:
        yield error_event(problem if isinstance(problem, RbeeError) else TimedOut(str(problem)), anthropic=anthropic)
    finally:
        answer.close()


def error_event(problem: RbeeError, *, anthropic: bool = False) -> bytes:
    """Return an error as a server-sent event of either dialect."""
    name = b"event: error\n" if anthropic else b""
    return name + b"data: " + encode_error(problem, anthropic=anthropic) + b"\n\n"


def _whole(data: bytes) -> int:
    """Return where the last whole event ends (WHATWG HTML 9.2.6: an empty line ends an event)."""
    plain, carriage = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    return max(plain + 2 if plain >= 0 else 0, carriage + 4 if carriage >= 0 else 0)
