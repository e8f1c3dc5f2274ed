"""When a worker proves to systemd that it lives, and when it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from rbee.http.server import Response, Routes, Server
from rbee.http.upstream import Upstream
from rbee.notify import Notifier
from rbee.plugin import ServingBackend
from rbee.wire.fleet import WorkerSpec
from rbee.worker.backends import find
from rbee.worker.pulse import ACCEPTS_WITHIN_S, LIBRARY_STALL_S, SERVING_STALL_S, Pulse
from rbee.worker.runner import Runner


class Time:
    """A clock that the test moves, and with it the server's loop as long as that turns."""

    def __init__(self, server: Server) -> None:
        self.moment, self.server, self.turns = 1000.0, server, True
        server.turned_at = self.moment

    def __call__(self) -> float:
        return self.moment

    def passes(self, seconds: float) -> None:
        self.moment += seconds
        if self.turns:
            self.server.turned_at = self.moment


class Engine:
    """A serving engine's metrics, as it tells them."""

    def __init__(self) -> None:
        self.steps, self.stuck = 0, False
        routes = Routes()
        routes.add("GET", "/metrics", lambda _: Response(self._text(), 503 if self.stuck else 200, "text/plain"))
        self.server = Server("127.0.0.1", 0, routes)
        self.server.start()

    def _text(self) -> bytes:
        return f"n_decode_total {self.steps}\n".encode()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server("127.0.0.1", 0, Routes())
    yield server
    server.server_close()


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.server.shutdown()
    engine.server.server_close()


def runner(backend: str) -> Runner:
    ready = Runner(WorkerSpec(name="one", backend=backend, model="one"), find(backend)())
    ready.status = "ready"
    return ready


def test_a_server_that_accepts_no_connections_is_not_alive(server: Server) -> None:
    time = Time(server)
    pulse = Pulse(runner("echo"), server, Notifier(), clock=time)
    time.passes(3600)
    assert pulse.lives()
    time.turns = False
    time.passes(ACCEPTS_WITHIN_S + 1)
    assert not pulse.lives()


def test_jobs_of_a_library_must_move(server: Server) -> None:
    time, work = Time(server), runner("echo")
    pulse = Pulse(work, server, Notifier(), clock=time)
    work.enter()
    assert pulse.lives()
    for _ in range(10):
        time.passes(LIBRARY_STALL_S / 2)
        work.moved()
        assert pulse.lives()
    time.passes(LIBRARY_STALL_S / 2)
    assert pulse.lives()
    time.passes(LIBRARY_STALL_S)
    assert not pulse.lives()
    work.leave()
    assert pulse.lives()


def test_an_engine_that_decodes_lives_though_its_jobs_are_silent(server: Server, engine: Engine) -> None:
    time, work = Time(server), runner("xllamacpp")
    assert isinstance(work.backend, ServingBackend)
    work.upstream = Upstream(f"http://127.0.0.1:{engine.server.port}")
    pulse = Pulse(work, server, Notifier(), clock=time)
    work.enter()
    for _ in range(10):
        engine.steps += 1
        assert pulse.lives()
        time.passes(SERVING_STALL_S / 2)
    assert pulse.lives()
    time.passes(SERVING_STALL_S + 1)
    assert not pulse.lives()
    engine.steps += 1
    engine.stuck = True
    assert not pulse.lives()
    engine.stuck = False
    assert pulse.lives()
    work.upstream.close()


class Told(Notifier):
    """Keeps what systemd would be told."""

    said: ClassVar[list[tuple[str, ...]]] = []

    def send(self, *assignments: str) -> None:
        self.said.append(assignments)


def test_each_step_of_a_load_gives_it_more_time(server: Server) -> None:
    work = runner("echo")
    work.status, told = "loading", Told()
    told.said.clear()
    pulse = Pulse(work, server, told)
    for progress in (0.0, 0.0, 0.3, 0.3, 0.6):
        work.progress = progress
        pulse.beat()
    extended = [said[0] for said in told.said if any(one.startswith("EXTEND_TIMEOUT_USEC=") for one in said)]
    assert extended == ["STATUS=loading one, 30%", "STATUS=loading one, 60%"]


def test_the_first_beats_of_a_long_idle_worker_give_a_job_its_time(server: Server) -> None:
    time, work = Time(server), runner("echo")
    pulse = Pulse(work, server, Notifier(), clock=time)
    assert pulse.lives()
    time.passes(10 * LIBRARY_STALL_S)
    work.enter()
    assert pulse.lives()
