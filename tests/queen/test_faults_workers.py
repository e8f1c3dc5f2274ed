"""Workers that die, stand or always fail, among several: what a client sees, and that the next jobs go elsewhere."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from queen_rig import FleetFolder, until_state, view

from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, running_queen, until

CHAT = "/v1/chat/completions"
SERVERS = 3


def chat(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": "honey", "messages": [{"role": "user", "content": text}], **fields}


@pytest.fixture
def servers() -> Iterator[list[RunningServer]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(running_server()) for _ in range(SERVERS)]


@pytest.fixture
def queen(fleet: FleetFolder, servers: list[RunningServer]) -> Iterator[RunningQueen]:
    """Return a queen with three servers of one model; the built-in script sends the first job to `s0`."""
    lines = [f"Worker s{number} model=honey url={server.url}" for number, server in enumerate(servers)]
    fleet.write(desk=["HivePort none", *lines])
    with running_queen("--no-hive", "--inventory", str(fleet.folder)) as running:
        until(lambda: list(states(running).values()) == ["ready"] * SERVERS, "the servers to answer")
        yield running


def states(queen: RunningQueen) -> dict[str, str]:
    shown = view(queen, "desk")
    return {one.name: str(one.state) for one in shown.workers} if shown else {}


def metric(queen: RunningQueen, start: str) -> float:
    lines = queen.client.send("GET", "/metrics").read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


class Asking:
    """A request in a thread of its own; `answer` waits for its end."""

    def __init__(self, queen: RunningQueen, body: dict[str, Any]) -> None:
        self.status, self.worker, self.body = 0, "", b""
        self._address, self._asked = urlsplit(queen.url).netloc, json.dumps(body)
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=120)
        with contextlib.closing(connection):
            connection.request("POST", CHAT, self._asked)
            answer = connection.getresponse()
            self.status, self.worker = answer.status, answer.getheader("X-Rbee-Worker", "")
            while data := answer.read1():
                self.body += data

    def answer(self) -> tuple[int, bytes]:
        """Return the status and the whole body."""
        self._thread.join(120)
        assert not self._thread.is_alive()
        return self.status, self.body


def ask(queen: RunningQueen, **fields: Any) -> tuple[int, bytes]:
    return Asking(queen, chat(**fields)).answer()


def whole(answer: tuple[int, bytes]) -> bool:
    """Return True for a good answer, a stream or not."""
    status, body = answer
    if b"data:" in body:
        return status == 200 and body.endswith(b"data: [DONE]\n\n") and body.count(b'"content"') == 3
    return status == 200 and b"one two three" in body


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_is_killed_before_its_first_byte_is_replaced_by_another(
    queen: RunningQueen, servers: list[RunningServer], stream: bool
) -> None:
    servers[0].behave(first_s=600)
    asking = Asking(queen, chat(stream=stream))
    until(lambda: servers[0].told().in_flight == 1, "the job to reach the first server")
    servers[0].process.kill()
    assert whole(asking.answer())
    assert metric(queen, "rbee_job_retries_total") == 1
    # It is known to be dead: nothing is tried there again, nor elsewhere for its sake.
    for _ in range(4):
        assert whole(ask(queen, stream=stream))
    assert metric(queen, "rbee_job_retries_total") == 1
    assert states(queen)["s0"] == "failed"


def test_one_that_is_killed_in_the_middle_of_streams_ends_them_and_no_other(
    queen: RunningQueen, servers: list[RunningServer]
) -> None:
    for server in servers:
        server.behave(word_s=0.05)
    streams = [Asking(queen, chat("word " * 80, stream=True)) for _ in range(2 * SERVERS)]
    until(lambda: all(stream.body.count(b'"content"') for stream in streams), "all of them to begin")
    servers[0].process.kill()
    for stream in streams:
        _, body = stream.answer()
        if stream.worker == "desk/s0":
            last = body.strip().rpartition(b"\n")[2]
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "worker_lost"
            assert b"[DONE]" not in body
        else:
            assert body.endswith(b"data: [DONE]\n\n")
    assert sum(stream.worker == "desk/s0" for stream in streams) == 2
    assert metric(queen, 'rbee_streams_broken_total{code="worker_lost"}') == 2
    assert metric(queen, "rbee_job_retries_total") == 0
    assert whole(ask(queen))


def test_one_that_stands_keeps_nobody_waiting_for_good(queen: RunningQueen, servers: list[RunningServer]) -> None:
    """Its kernel takes connections on, so that only its silence tells: jobs that wait there are sent elsewhere."""
    assert whole(ask(queen))
    os.kill(servers[0].process.pid, signal.SIGSTOP)
    try:
        waiting = [Asking(queen, chat(stream=number % 2 == 0)) for number in range(SERVERS)]
        # Others are served meanwhile: they go to those that have less to do.
        assert all(whole(ask(queen)) for _ in range(6))
        assert all(whole(one.answer()) for one in waiting)
        assert states(queen)["s0"] == "failed"
    finally:
        os.kill(servers[0].process.pid, signal.SIGCONT)
    until(lambda: states(queen)["s0"] == "ready", "it to be taken back")


def test_a_host_that_stands_keeps_nobody_waiting_for_good(fleet: FleetFolder) -> None:
    with contextlib.ExitStack() as stack:
        hives = {name: stack.enter_context(fleet.hive(name)) for name in ("one", "two")}
        fleet.write(**{name: hive.port for name, hive in hives.items()})
        queen = stack.enter_context(running_queen("--no-hive", "--inventory", str(fleet.folder)))
        for name in hives:
            until_state(queen, name, "ready")
        first = Asking(queen, chat())
        assert whole(first.answer())
        stands = hives[first.worker.partition("/")[0]]
        os.kill(stands.process.pid, signal.SIGSTOP)
        try:
            waiting = [Asking(queen, chat()) for _ in range(4)]
            assert all(whole(one.answer()) for one in waiting)
            assert first.worker not in {one.worker for one in waiting}
        finally:
            os.kill(stands.process.pid, signal.SIGCONT)
        until(lambda: not queen.status().problems, "it to be taken back")


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_always_fails_is_left_out_and_comes_back(
    queen: RunningQueen, servers: list[RunningServer], stream: bool
) -> None:
    servers[0].behave(answer="error")
    for _ in range(40):
        assert whole(ask(queen, stream=stream))
        if metric(queen, "rbee_worker_ejected"):
            break
    assert metric(queen, 'rbee_worker_ejected{hive="desk",worker="s0"}') == 1
    failed = servers[0].told().jobs
    assert failed <= 5
    servers[0].behave(answer="ok")
    until(lambda: whole(ask(queen, stream=stream)) and servers[0].told().answered, "it to be tried again")
    assert metric(queen, "rbee_worker_ejected") == 0
