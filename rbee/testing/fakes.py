"""Small real HTTP servers that stand in for a hive or a queen and record what they are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgspec

from rbee.http.server import Request, Response, Routes, Server, reply
from rbee.wire.fleet import HiveReport, WorkerReady

GUARD_S = 60.0


@dataclass
class Call:
    """One call that came in."""

    method: str
    path: str
    token: str
    body: bytes


@dataclass
class FakeServer:
    """A server on a free loopback port that answers every call of `paths` with `status`."""

    paths: tuple[str, ...] = ()
    status: int = 200
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        routes = Routes()
        for path in self.paths:
            routes.add("POST", path, self._record)
        self._came = threading.Condition()
        self._server = Server("127.0.0.1", 0, routes)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self._server.start()

    def wait_for(self, condition: Callable[[list[Call]], bool], what: str = "calls") -> list[Call]:
        """Return the calls once `condition` holds for them. Raises: AssertionError after a minute."""
        deadline = time.monotonic() + GUARD_S
        with self._came:
            while not condition(self.calls):
                left = deadline - time.monotonic()
                assert left > 0, f"waited {GUARD_S:g} s for {what}; came: {self.calls}"
                self._came.wait(left)
            return list(self.calls)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _record(self, request: Request) -> Response:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        with self._came:
            self.calls.append(Call(request.method, request.path, token, request.body))
            self._came.notify_all()
        return reply({}, self.status)


class FakeHive(FakeServer):
    """A hive that only listens to its workers."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("/v1/workers/ready",), status)

    def ready(self) -> list[WorkerReady]:
        """Wait for the first announcement and return all that came."""
        calls = self.wait_for(bool, "a worker's announcement")
        return [msgspec.json.decode(call.body, type=WorkerReady) for call in calls]


class FakeQueen(FakeServer):
    """A queen that only listens to its hives."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("/v1/orchestrator/hive-report", "/v1/orchestrator/worker-ready"), status)

    def reports(self) -> list[HiveReport]:
        """Wait for the first report and return all that came."""
        path = "/v1/orchestrator/hive-report"
        calls = self.wait_for(lambda calls: any(call.path == path for call in calls), "a hive's report")
        return [msgspec.json.decode(call.body, type=HiveReport) for call in calls if call.path == path]
