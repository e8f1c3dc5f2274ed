"""Faults of workers, clients and networks on the queen's data path, each with what its client sees."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from queen_rig import FleetFolder, view

from rbee.errors import RbeeError, TimedOut
from rbee.http.upstream import UNHEARD_FOR_S, Upstream
from rbee.inventory.fleet import At, WorkerLine
from rbee.queen import health, relay
from rbee.queen.hives import Worker
from rbee.queen.relay import Relay
from rbee.queen.remote import report_of
from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, processes_of, running_queen, until

CHAT = "/v1/chat/completions"


def chat(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": "honey", "messages": [{"role": "user", "content": text}], **fields}


def ask(queen: RunningQueen) -> str:
    return str(queen.client.post(CHAT, chat(), dict[str, Any])["choices"][0]["message"]["content"])


def states(queen: RunningQueen) -> dict[str, str]:
    shown = view(queen, "desk")
    return {one.name: str(one.state) for one in shown.workers} if shown else {}


def metric(queen: RunningQueen, start: str) -> float:
    lines = queen.client.send("GET", "/metrics").read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


@contextlib.contextmanager
def queen_of(fleet: FleetFolder, *urls: str, **options: Any) -> Iterator[RunningQueen]:
    """Run a queen with these servers, once she has heard of all of them."""
    lines = [f"Worker s{number} model=honey url={url}" for number, url in enumerate(urls)]
    fleet.write(desk=["HivePort none", *lines])
    with running_queen("--no-hive", "--inventory", str(fleet.folder), **options) as queen:
        until(lambda: len(found := states(queen)) == len(urls) and "starting" not in found.values(), "the servers")
        yield queen


def streaming(queen: RunningQueen, words: int) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=120)
    connection.request("POST", CHAT, json.dumps(chat("word " * words, stream=True)))
    return connection, connection.getresponse()


def posted(body: bytes) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def error_of(body: bytes) -> dict[str, Any]:
    last = [line[6:] for line in body.splitlines() if line.startswith(b"data: {")][-1]
    return dict(json.loads(last)["error"])


def test_a_server_killed_in_the_middle_ends_the_stream_with_a_typed_event(fleet: FleetFolder) -> None:
    with running_server(word_s=0.05) as server, queen_of(fleet, server.url) as queen:
        connection, answer = streaming(queen, 2000)
        first = answer.read1(200)
        os.kill(server.process.pid, signal.SIGKILL)
        body = first + answer.read()
        connection.close()
        assert error_of(body)["code"] == "worker_lost"
        assert b"[DONE]" not in body
        assert server.process.wait(60) == -signal.SIGKILL
        assert metric(queen, "rbee_job_retries_total") == 0


def test_a_server_killed_before_its_first_byte_is_replaced(fleet: FleetFolder) -> None:
    with running_server() as hangs, running_server() as other, queen_of(fleet, hangs.url, other.url) as queen:
        hangs.behave(answer="hang")
        answers: list[str] = []
        asking = threading.Thread(target=lambda: answers.append(ask(queen)))
        asking.start()
        until(lambda: hangs.told().in_flight == 1, "the job to reach the first server")
        os.kill(hangs.process.pid, signal.SIGKILL)
        asking.join(60)
        assert answers == ["one two three"]
        assert metric(queen, "rbee_job_retries_total") == 1


def test_a_black_hole_holds_up_one_job_and_no_other(fleet: FleetFolder) -> None:
    """A full backlog drops connection requests, as a firewall or a dead machine does."""
    with running_server() as server, socket.socket() as hole, contextlib.ExitStack() as stack:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
        url = f"http://127.0.0.1:{hole.getsockname()[1]}"
        with queen_of(fleet, url, server.url) as queen:
            assert states(queen) == {"s0": "failed", "s1": "ready"}
            assert [ask(queen) for _ in range(5)] == ["one two three"] * 5
            found = {one.name: one.reason for one in view(queen, "desk").workers}  # type: ignore[union-attr]
            assert "timed out" in found["s0"]


def test_the_kernel_gives_up_a_connection_that_nobody_acknowledges() -> None:
    with running_server() as server:
        upstream = Upstream(server.url)
        answer = upstream.request("GET", "/v1/models")
        with socket.socket(fileno=os.dup(answer.fileno())) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == UNHEARD_FOR_S * 1000
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < UNHEARD_FOR_S
        answer.close()
        upstream.close()


@pytest.fixture
def stopped() -> Iterator[RunningServer]:
    """Return a server that is stopped, as by SIGSTOP or a debugger: its kernel still acknowledges."""
    with running_server() as server:
        os.kill(server.process.pid, signal.SIGSTOP)
        yield server


def test_a_silent_worker_is_asked_whether_it_lives(stopped: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "STALLED_S", 0.0)
    monkeypatch.setattr(health, "PROBE_TIMEOUT_S", 0.5)
    line = WorkerLine(name="says", at=At("x.conf", 1), model="honey", url=stopped.url)
    upstream = Upstream(stopped.url)
    worker = Worker("desk", report_of(line), upstream, upstream, look=lambda: None)
    before = time.monotonic()
    with pytest.raises(TimedOut, match="does not answer any more"):
        Relay._check_alive(worker, before)
    os.kill(stopped.process.pid, signal.SIGCONT)
    monkeypatch.setattr(health, "PROBE_TIMEOUT_S", 60.0)
    assert Relay._check_alive(worker, before) > before
    upstream.close()


def test_a_reader_that_takes_nothing_is_cut_and_harms_nobody(fleet: FleetFolder) -> None:
    with running_server() as server, queen_of(fleet, server.url) as queen:
        parts = urlsplit(queen.url)
        body = json.dumps(chat("word " * 200_000, stream=True)).encode()
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect((parts.hostname, parts.port))
            lazy.sendall(
                f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
            until(lambda: metric(queen, "rbee_worker_jobs") == 1, "the job to run")
            for _ in range(20):
                assert ask(queen) == "one two three"
            assert metric(queen, "rbee_worker_jobs") == 1
            until(lambda: metric(queen, "rbee_worker_jobs") == 0, "the reader to be cut", 120)
        assert metric(queen, "rbee_jobs_in_flight") == 0
        until(lambda: server.told().in_flight == 0, "the server to be free")
        assert not [line for line in queen.log if "Traceback" in line]


def limited(queen: RunningQueen, descriptors: int) -> None:
    """Have the queen go on with a server process that may open only so many files."""
    resource.prlimit(queen.record.pid, resource.RLIMIT_NOFILE, (descriptors, descriptors))
    [pid] = [pid for pid, line in processes_of(queen.home) if "rbee.queen" in line and pid != queen.record.pid]
    os.kill(pid, signal.SIGKILL)
    until(lambda: answers(queen), "the next server process to know the server")


def answers(queen: RunningQueen) -> bool:
    try:
        return ask(queen) == "one two three"
    except RbeeError:
        return False


def status_of(sock: socket.socket) -> bytes:
    return sock.recv(65536).partition(b"\r\n")[0]


def test_idle_connections_make_room_and_jobs_are_never_cut_for_new_ones(fleet: FleetFolder) -> None:
    with running_server() as server, queen_of(fleet, server.url) as queen, contextlib.ExitStack() as stack:
        limited(queen, 2 * 40 + 128)
        parts = urlsplit(queen.url)

        def connected() -> socket.socket:
            return stack.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=60))

        idle = [connected() for _ in range(300)]
        assert ask(queen) == "one two three"
        server.behave(answer="hang")
        body = json.dumps(chat()).encode()
        request = posted(body)
        queen.client.close()
        busy: list[socket.socket] = []
        refused: list[socket.socket] = []
        while not refused:
            assert len(busy) < 200, "no connection is refused"
            busy.append(connected())
            busy[-1].sendall(request)
            refused, _, _ = select.select(busy, [], [], 0.05)
        assert {status_of(sock) for sock in refused} == {b"HTTP/1.1 503 Service Unavailable"}
        busy = [sock for sock in busy if sock not in refused]
        # Those that were idle have made room; of the jobs, none has.
        assert [sock.recv(1) for sock in idle[:50]] == [b""] * 50
        for sock in busy:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(1)
            sock.close()
        server.behave(answer="ok")
        until(lambda: answers(queen), "the queen to serve again")
