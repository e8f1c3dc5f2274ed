"""Pass a worker's answer on: bytes as they come, an honest end whatever happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rbee.errors import RbeeError, ShuttingDown, TimedOut, WorkerLost
from rbee.http.upstream import Answer
from rbee.queen.admission import Place
from rbee.queen.client_watch import ClientGone
from rbee.queen.job import Exchange, Job, Reply
from rbee.queen.metrics import Metrics
from rbee.wire.errors import decode_error, encode_error

PING = b": ping\n\n"
MAX_ANSWER_BYTES = 64 * 1024 * 1024
CUT_BEFORE_END_S = 2.0


class Relay:
    """Turns exchanges into replies.

    `draining_since` tells since when this process is to end (None: it is not); streams that would outlast
    `drain_s` end themselves before they are cut.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        ping_s: float,
        silence_timeout_s: float,
        drain_s: float,
        draining_since: Callable[[], float | None],
    ) -> None:
        self._metrics = metrics
        self._ping_s = ping_s
        self._silence_timeout_s = silence_timeout_s
        self._drain_s = drain_s
        self._draining_since = draining_since

    def reply(self, job: Job, exchange: Exchange, place: Place) -> Reply:
        """Return the reply once its first bytes are here.

        A whole answer is read to its end before the client sees any of it, so that a worker that dies in the middle
        of it can be replaced. Raises: UpstreamError for what the engine refused, WorkerLost, ClientGone.
        """
        answer = exchange.answer
        streams = answer.headers.get("content-type", "").startswith("text/event-stream")
        try:
            if answer.status >= 400:
                raise decode_error(answer.status, self._whole(job, answer))
            body = self._first(job, answer) if streams else self._whole(job, answer)
        except BaseException:
            self._end(exchange)
            raise
        content_type = answer.headers.get("content-type", "application/json")
        self._metrics.first_byte(job)
        if streams:
            return Reply(answer.status, content_type, Stream(self, job, exchange, place, body))
        self._end(exchange)
        self._metrics.count_usage(job, body)
        place.leave()
        return Reply(answer.status, content_type, body)

    def _whole(self, job: Job, answer: Answer) -> bytes:
        try:
            return answer.read(MAX_ANSWER_BYTES, self._silence_timeout_s)
        except WorkerLost:
            job.client.check()
            raise

    def _first(self, job: Job, answer: Answer) -> bytes:
        try:
            return answer.next(self._silence_timeout_s)
        except TimeoutError:
            raise TimedOut(f"{job.worker_id} began an answer but sent nothing of it") from None
        except WorkerLost:
            job.client.check()
            raise

    def chunks(self, job: Job, answer: Answer, first: bytes) -> Iterator[bytes]:
        """Yield an event stream to its end; comments fill its silences, a typed event tells of a failure."""
        tail = first
        yield first
        silent_since = time.monotonic()
        try:
            while True:
                try:
                    data = answer.next(self._ping_s)
                except TimeoutError:
                    self._check_end(silent_since)
                    yield PING
                    continue
                if not data:
                    break
                tail = (tail + data)[-8192:] if len(data) < 8192 else data[-8192:]
                silent_since = time.monotonic()
                yield data
                self._check_end(silent_since)
        except RbeeError as problem:
            job.client.check()
            self._metrics.broken(job, problem)
            yield _error_event(job, problem)
            raise
        self._metrics.count_usage(job, tail)

    def _check_end(self, silent_since: float) -> None:
        now = time.monotonic()
        if now - silent_since > self._silence_timeout_s:
            raise TimedOut(f"The worker was silent for {self._silence_timeout_s:g} s")
        since = self._draining_since()
        if since is not None and now - since > self._drain_s - CUT_BEFORE_END_S:
            raise ShuttingDown("The queen is shutting down; this answer is not whole", retry_after_s=5)

    @staticmethod
    def _end(exchange: Exchange) -> None:
        exchange.worker.in_flight -= 1
        exchange.end()


class Stream:
    """The body of a streamed reply. `close` ends the job at the worker, also when nothing was read of it."""

    def __init__(self, relay: Relay, job: Job, exchange: Exchange, place: Place, first: bytes) -> None:
        self._chunks = relay.chunks(job, exchange.answer, first)
        self._exchange: Exchange | None = exchange
        self._relay = relay
        self._place = place
        self._problem: BaseException | None = ClientGone()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> bytes:
        try:
            return next(self._chunks)
        except StopIteration:
            self._problem = None
            self.close()
            raise
        except RbeeError as problem:
            # The typed event was the last of this body; the stream ends without [DONE].
            self._problem = problem
            self.close()
            raise StopIteration from None
        except ClientGone:
            self.close()
            raise StopIteration from None

    def close(self) -> None:
        """End the exchange and leave the job's place, once."""
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        with contextlib.suppress(ValueError):
            self._chunks.close()  # type: ignore[attr-defined]  # a generator
        self._relay._end(exchange)
        self._place.leave(self._problem)


def _error_event(job: Job, problem: RbeeError) -> bytes:
    if job.request.dialect == "anthropic":
        return b"event: error\ndata: " + encode_error(problem, anthropic=True) + b"\n\n"
    if job.path == "/v1/responses":
        return b"event: error\ndata: " + encode_error(problem) + b"\n\n"
    return b"data: " + encode_error(problem) + b"\n\n"
