"""Pass a worker's answer on: bytes as they come, an honest end whatever happens."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

from rbee.errors import Lost, RbeeError, ShuttingDown, TimedOut, Unreachable, WorkerLost
from rbee.queen.admission import Place
from rbee.queen.client_watch import ClientGone
from rbee.queen.health import answers, failed, is_fault, is_full
from rbee.queen.hives import Worker
from rbee.queen.job import DECODE, Exchange, Job, Reply
from rbee.queen.metrics import Metrics
from rbee.queen.waiting import CUT_BEFORE_END_S, error_event
from rbee.wire.errors import decode_error

PING = b": ping\n\n"
EVENT, DONE = b"data:", b"[DONE]"
LAST_READS = 6
"""How much of a stream is kept for its usage, which engines tell in one of the last two events."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
STALLED_S = 30.0
"""A silence after which a worker must show that it lives; on a slow machine, a long prompt of another job is one."""


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
        first_byte_timeout_s: float,
        silence_timeout_s: float,
        drain_s: float,
        draining_since: Callable[[], float | None],
    ) -> None:
        self._metrics = metrics
        self._ping_s = ping_s
        self._first_byte_timeout_s = first_byte_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._drain_s = drain_s
        self._draining_since = draining_since

    def reply(self, job: Job, exchange: Exchange, place: Place) -> Reply:
        """Return the reply once its first bytes are here.

        A whole answer is read to its end before the client sees any of it, so that a worker that dies in the middle
        of it can be replaced. Raises: UpstreamError for what the engine refused, WorkerLost, ClientGone.
        """
        answer, worker = exchange.answer, exchange.worker
        streams = answer.headers.get("content-type", "").startswith("text/event-stream")
        try:
            if answer.status >= 300:
                raise self._refusal(job, exchange)
            body = self._first(job, exchange) if streams else self._whole(job, exchange)
            worker.ejection.began()
        except BaseException:
            worker.ejection.dropped()
            self._end(exchange)
            raise
        finally:
            worker.unanswered.pop(job.id, None)
        content_type = answer.headers.get("content-type", "application/json")
        self._metrics.first_byte(job)
        if streams:
            job.enter(DECODE)
            return Reply(answer.status, content_type, Stream(self, job, exchange, place, body))
        self._end(exchange)
        worker.ejection.succeeded()
        self._metrics.count_usage(job, body)
        worker.tokens_written += job.completion_tokens
        place.leave()
        return Reply(answer.status, content_type, body)

    def _refusal(self, job: Job, exchange: Exchange) -> RbeeError:
        """Return what an error answer says, and note what it says of the worker."""
        answer, worker = exchange.answer, exchange.worker
        if answer.status < 400:
            failed(job, worker)
            return Unreachable(
                f"{worker.id} answers {answer.status}; the queen follows no redirects", hint="the server's own address"
            )
        problem = decode_error(answer.status, self._whole(job, exchange))
        if answer.status in (401, 403) and worker.look is not None:
            # It is the queen's key: the client, whose own is good, must not read that it is not.
            failed(job, worker)
            worker.look()
            return Unreachable(f"{worker.id} refuses the queen's API key", hint="the key-file of its Worker line")
        if is_fault(problem, answer.headers.get("retry-after")):
            failed(job, worker)
        elif is_full(problem):
            job.failed_at.add(worker.id)
        return problem

    def _whole(self, job: Job, exchange: Exchange) -> bytes:
        # An engine may send the head of a whole answer long before the rest.
        try:
            return exchange.answer.read(MAX_ANSWER_BYTES, self._first_byte_timeout_s)
        except Lost:
            job.client.check()
            failed(job, exchange.worker)
            raise
        except ValueError as problem:
            raise WorkerLost(str(problem)) from None

    def _first(self, job: Job, exchange: Exchange) -> bytes:
        try:
            return exchange.answer.next(self._first_byte_timeout_s)
        except TimeoutError:
            failed(job, exchange.worker)
            raise TimedOut(f"{job.worker_id} began an answer but sent nothing of it") from None
        except WorkerLost:
            job.client.check()
            failed(job, exchange.worker)
            raise

    def chunks(self, job: Job, exchange: Exchange, first: bytes) -> Iterator[bytes]:
        """Yield an event stream to its end; comments fill its silences, a typed event tells of a failure."""
        answer, worker = exchange.answer, exchange.worker
        last = deque([first], maxlen=LAST_READS)
        events, whole = first.count(EVENT), False
        worker.tokens_written += events
        # Whoever has only the stream can still ask for the job; clients of event streams ignore comments.
        heard_at = alive_at = time.monotonic()
        try:
            yield b": job %s\n\n%s" % (job.id.encode(), first)
            while True:
                try:
                    data = answer.next(self._ping_s)
                except TimeoutError:
                    self._check_end(heard_at)
                    alive_at = self._check_alive(worker, alive_at)
                    yield PING
                    continue
                if not data:
                    whole = True
                    break
                last.append(data)
                came = data.count(EVENT)
                events += came
                worker.tokens_written += came
                yield data
                # After the yield: the time that a slow reader took is no silence of the worker's.
                heard_at = alive_at = time.monotonic()
                self._check_end(heard_at)
        except RbeeError as found:
            problem = job.client.why(found)
            if isinstance(found, Lost) and problem is found:
                failed(job, worker)
            self._metrics.broken(job, problem)
            yield error_event(job, problem)
            raise problem from None
        finally:
            # Also of an answer that broke off, or whose client left: what came of it was made for that client.
            tail = b"".join(last)
            self._metrics.count_usage(job, tail, first, events - (DONE in tail[-32:]), whole=whole)
        worker.ejection.succeeded()
        exchange.note_speed(job.completion_tokens)

    def _check_end(self, heard_at: float) -> None:
        now = time.monotonic()
        if now - heard_at > self._silence_timeout_s:
            raise TimedOut(f"The worker was silent for {self._silence_timeout_s:g} s")
        since = self._draining_since()
        if since is not None and now - since > self._drain_s - CUT_BEFORE_END_S:
            raise ShuttingDown("The queen is shutting down; this answer is not whole", retry_after_s=5)

    @staticmethod
    def _check_alive(worker: Worker, alive_at: float) -> float:
        """Return when a silent worker last showed that it lives; asked once in `STALLED_S`. Raises: TimedOut."""
        if time.monotonic() - alive_at <= STALLED_S:
            return alive_at
        if not answers(worker):
            raise TimedOut(f"{worker.id} was silent for {STALLED_S:g} s, and does not answer any more")
        return time.monotonic()

    @staticmethod
    def _end(exchange: Exchange) -> None:
        exchange.worker.in_flight -= 1
        exchange.end()


class Stream:
    """The body of a streamed reply. `close` ends the job at the worker, also when nothing was read of it."""

    def __init__(self, relay: Relay, job: Job, exchange: Exchange, place: Place, first: bytes) -> None:
        self._chunks = relay.chunks(job, exchange, first)
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
