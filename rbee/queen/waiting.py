"""Streams that wait for their turn or for a model to load: kept alive, and told what is happening."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import msgspec
from gevent.event import AsyncResult

from rbee.errors import RbeeError, ShuttingDown
from rbee.queen.client_watch import ClientGone
from rbee.queen.job import Job, Reply
from rbee.wire.errors import encode_error

CUT_BEFORE_END_S = 2.0

Run = Callable[[Job], Reply]
Status = Callable[[Job], dict[str, object]]


class Patience:
    """Answers a stream that has waited `after_s` with its head and comments, until its first bytes are here.

    Before that a client gets a real status code. The comments (WHATWG HTML, 9.2.6) are ignored by every client of
    event streams, while an event of a name of our own would reach programs that use OpenAI's libraries as a chunk.
    """

    def __init__(
        self,
        status: Status,
        *,
        after_s: float,
        drain_s: float,
        draining_since: Callable[[], float | None],
    ) -> None:
        self._status = status
        self._after_s = after_s
        self._drain_s = drain_s
        self._draining_since = draining_since

    def reply(self, job: Job, run: Run) -> Reply:
        """Return a reply, that of a stream after `after_s` at the latest. Raises: what `run` raises till then."""
        if not job.stream:
            return run(job)
        work = Work(job, run)
        if work.wait(self._after_s):
            return work.result()
        return Reply(200, "text/event-stream", WaitingStream(self, job, work))

    def comment(self, job: Job) -> bytes:
        """Return the comment that says what is happening. Raises: ShuttingDown when there is no time left."""
        since = self._draining_since()
        if since is not None and time.monotonic() - since > self._drain_s - CUT_BEFORE_END_S:
            raise ShuttingDown("The queen is shutting down; this job was not begun", retry_after_s=5)
        told = self._status(job)
        if told["state"] == "running":
            return b": ping\n\n"
        return b": %s %s\n\n" % (str(told["state"]).encode(), msgspec.json.encode(told))

    @property
    def pause_s(self) -> float:
        """Return the seconds between two comments."""
        return self._after_s


class Work:
    """A job that runs in a greenlet of its own while its client is kept company."""

    def __init__(self, job: Job, run: Run) -> None:
        self._job = job
        self._done: AsyncResult[Reply] = AsyncResult()
        self._abandoned = False
        gevent.spawn(self._run, run)

    def wait(self, timeout_s: float) -> bool:
        """Return True once the job has a reply, or failed, within so many seconds."""
        self._done.wait(timeout_s)
        return self._done.ready()

    def result(self) -> Reply:
        """Return the reply of a job that has one. Raises: what ended it."""
        reply = self._done.get(block=False)
        assert reply is not None
        return reply

    def abandon(self) -> None:
        """End the job: nobody will take its reply."""
        self._abandoned = True
        if self._done.ready():
            self._drop()
        else:
            self._job.client.leave()

    def _run(self, run: Run) -> None:
        try:
            self._done.set(run(self._job))
        except BaseException as problem:  # noqa: BLE001  # it is raised where the client is
            self._done.set_exception(problem)
        if self._abandoned:
            self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(Exception):
            close = getattr(self.result().body, "close", None)
            if close:
                close()


class WaitingStream:
    """The body of a stream that began before its answer: comments first, then the answer's own body."""

    def __init__(self, patience: Patience, job: Job, work: Work) -> None:
        self._chunks = self._begin(patience, job, work)
        self._work: Work | None = work
        self._body: Any = None

    def __iter__(self) -> WaitingStream:
        return self

    def __next__(self) -> bytes:
        return next(self._chunks) if self._body is None else next(self._body)

    def close(self) -> None:
        """End the job, whether it has an answer yet or not."""
        work, self._work = self._work, None
        if work is not None:
            work.abandon()

    def _begin(self, patience: Patience, job: Job, work: Work) -> Iterator[bytes]:
        try:
            yield patience.comment(job)
            while not work.wait(patience.pause_s):
                yield patience.comment(job)
            body = work.result().body
        except ClientGone:
            return
        except RbeeError as problem:
            yield error_event(job, problem)
            return
        if isinstance(body, bytes):
            yield b"data: " + body + b"\n\n"
            return
        self._body = iter(body)
        with contextlib.suppress(StopIteration):
            yield next(self._body)


def error_event(job: Job, problem: RbeeError) -> bytes:
    """Return the event that ends a stream which cannot be ended well, in the words of its API."""
    if job.request.dialect == "anthropic":
        return b"event: error\ndata: " + encode_error(problem, anthropic=True) + b"\n\n"
    if job.path == "/v1/responses":
        return b"event: error\ndata: " + encode_error(problem) + b"\n\n"
    return b"data: " + encode_error(problem) + b"\n\n"
