"""One job as the worker counts it, from its admission to the last byte of its answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator

from rbee.http.server import Response
from rbee.worker.relay import ClientLeft
from rbee.worker.runner import Runner
from rbee.worker.usage import UsageReader

ERROR_EVENTS = (b'data: {"error"', b"event: error")
log = logging.getLogger("rbee.worker")


class Tracked:
    """A job that is counted as in flight until `finish`. Raises: Busy when the worker takes none."""

    def __init__(self, runner: Runner, endpoint: str, known: bool) -> None:
        self._runner = runner
        # A label for every path that a client thinks of would grow without end.
        self._endpoint = endpoint if known else "other"
        self._started = time.monotonic()
        self._usage = UsageReader()
        self._done = False
        self._broken = False
        runner.enter()

    def follow(self, response: Response) -> Response:
        """Return the response; a streamed one finishes the job when it ends or is closed."""
        if isinstance(response.body, bytes):
            self._usage.whole(response.body)
            self.finish(str(response.status))
        else:
            response.body = _Followed(self, response.body)
        return response

    def seen(self, data: bytes) -> None:
        """Look at a part of the answer as it passes."""
        self._runner.moved()
        self._usage.part(data)
        self._broken = self._broken or data.startswith(ERROR_EVENTS)

    def finish(self, status: str) -> None:
        """Count the job as over, once."""
        if self._done:
            return
        self._done = True
        seconds = time.monotonic() - self._started
        usage = self._usage
        status = "broken" if self._broken else status
        self._runner.metrics.finished(self._endpoint, status, seconds)
        self._runner.metrics.tokens(usage.prompt, usage.generated)
        # Last: whoever sees no job in flight finds this one counted.
        self._runner.leave()
        log.info("%s %s %.2f s, %d + %d tokens", self._endpoint, status, seconds, usage.prompt, usage.generated)


class _Followed:
    """A streamed body that tells its job how it ended, also when it is closed before its first byte."""

    def __init__(self, job: Tracked, body: Iterable[bytes]) -> None:
        self._job = job
        self._body = body
        self._parts = iter(body)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            data = next(self._parts)
        except StopIteration:
            self._job.finish("200")
            raise
        except ClientLeft:
            self._job.finish("cancelled")
            raise ConnectionAbortedError("the client left") from None
        except BaseException:
            self._job.finish("broken")
            raise
        self._job.seen(data)
        return data

    def close(self) -> None:
        close = getattr(self._body, "close", None)
        if close is not None:
            close()
        self._job.finish("cancelled")
