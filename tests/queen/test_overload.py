"""More than the workers can do: as much is done as without it, the rest is refused at once, and nobody is harmed."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import resource
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from queen_rig import FleetFolder, until_state

from rbee.errors import QueueFull
from rbee.queen.queueing import ModelQueue, Ticket
from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, running_queen, until

CHAT = "/v1/chat/completions"
SLOTS = 8
JOB_S = 1.0
CAPACITY = SLOTS / JOB_S
WINDOW_S = 8.0
OVERLOAD = 10
SLOW_READERS = 500


def chat(text: str = "one two three", **fields: Any) -> bytes:
    return json.dumps({"model": "honey", "messages": [{"role": "user", "content": text}], **fields}).encode()


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server(word_s=JOB_S) as running:
        yield running


@contextlib.contextmanager
def queen_of(fleet: FleetFolder, server: RunningServer, slots: int) -> Iterator[RunningQueen]:
    fleet.write(desk=["HivePort none", f"Worker s model=honey slots={slots} url={server.url}"])
    with running_queen("--no-hive", "--inventory", str(fleet.folder)) as queen:
        until_state(queen, "desk", "ready")
        yield queen


def metric(queen: RunningQueen, start: str) -> float:
    lines = queen.client.send("GET", "/metrics").read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


class Crowd:
    """Clients that ask without end, each as soon as it was answered, or `pause_s` after it was refused."""

    def __init__(self, queen: RunningQueen, clients: int, pause_s: float = 0.0, **headers: str) -> None:
        self.statuses: Counter[int] = Counter()
        self.refused_s: list[float] = []
        self.waits: list[str] = []
        self._sockets: list[socket.socket] = []
        self._address = urlsplit(queen.url).netloc
        self._pause_s = pause_s
        self._headers = {name.replace("_", "-"): told for name, told in headers.items()}
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *told: object) -> None:
        self._end.set()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(120)

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=120)
        connection.connect()
        self._sockets.append(connection.sock)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            while not self._end.is_set():
                began = time.monotonic()
                connection.request("POST", CHAT, chat(), self._headers)
                answer = connection.getresponse()
                body = answer.read()
                self.statuses[answer.status] += 1
                if answer.status != 200:
                    self.refused_s.append(time.monotonic() - began)
                    self.waits.append(f"{json.loads(body)['error']['code']} {answer.getheader('Retry-After')}")
                    self._end.wait(self._pause_s)


def goodput(server: RunningServer) -> int:
    """Return how many jobs are answered in a while."""
    before = server.told().answered
    time.sleep(WINDOW_S)  # it is the window of a measurement, not a wait for something
    return server.told().answered - before


def full(queen: RunningQueen, jobs: int) -> None:
    until(lambda: metric(queen, "rbee_queue_jobs") >= jobs, f"{jobs} jobs to wait")


def test_ten_times_the_capacity_costs_no_goodput_and_is_refused_before_others_are_answered(
    fleet: FleetFolder, server: RunningServer
) -> None:
    with queen_of(fleet, server, SLOTS) as queen:
        with Crowd(queen, SLOTS) as crowd:
            until(lambda: server.told().answered >= SLOTS, "the first answers")
            alone = goodput(server)
        assert set(crowd.statuses) == {200}
        # 256 wait, which is the limit; beside them, so many clients ask that ten times the capacity is asked for.
        refused_clients = 40
        pause_s = refused_clients / (OVERLOAD * CAPACITY)
        with Crowd(queen, 256 + SLOTS) as waiting:
            full(queen, 250)
            with Crowd(queen, refused_clients, pause_s) as more:
                until(lambda: sum(more.statuses.values()) > refused_clients, "jobs to be refused")
                before = len(more.refused_s)
                overloaded = goodput(server)
                while_overloaded = len(more.refused_s) - before
        refused = waiting.refused_s + more.refused_s
        assert while_overloaded > 5 * alone
        assert overloaded >= 0.9 * alone
        # Refusals are faster than the work itself, of which each has a whole queue before it.
        assert statistics.median(refused) < JOB_S
        assert set(waiting.statuses) | set(more.statuses) == {200, 503}
        for told in set(waiting.waits + more.waits):
            code, after = told.split()
            assert code == "queue_full"
            assert int(after) >= 1
        until(lambda: metric(queen, "rbee_jobs_in_flight") == 0, "all jobs to end")


def test_the_urgent_are_served_while_the_queue_is_full_of_others(fleet: FleetFolder, server: RunningServer) -> None:
    with (
        queen_of(fleet, server, SLOTS) as queen,
        Crowd(queen, 256 + SLOTS + 20, 0.2, X_Rbee_Priority="batch") as batch,
    ):
        full(queen, 250)
        until(lambda: batch.statuses[503] > 0, "jobs to be refused")
        with Crowd(queen, 2 * SLOTS, X_Rbee_Priority="interactive") as urgent:
            until(lambda: urgent.statuses[200] > 0, "an urgent job to be answered")
            before = Counter(batch.statuses)
            until(lambda: urgent.statuses[200] >= 5 * SLOTS, "urgent jobs to be answered", 120)
            served = batch.statuses[200] - before[200]
        assert set(urgent.statuses) == {200}
        # One that ran when they came may have ended, and one in 30 s is let through.
        assert served <= urgent.statuses[200] / 4


class Queue:
    """A queue of two that wait, and who has lost its place."""

    def __init__(self) -> None:
        self.queue = ModelQueue(2, 30.0, lambda: 0.0)
        self.tickets: dict[str, Ticket] = {}
        assert self.queue.enter("interactive", "runs", 1, 1) is None

    def join(self, name: str, priority: Any = "normal", key: str = "k") -> bool:
        try:
            ticket = self.queue.enter(priority, key, 10, 1)
        except QueueFull:
            return False
        assert ticket is not None
        self.tickets[name] = ticket
        return True

    def displaced(self) -> list[str]:
        return [name for name, ticket in self.tickets.items() if ticket.left]

    def order(self) -> list[str]:
        found: list[str] = []
        while self.queue.waiting:
            self.queue.done(1.0)
            self.queue.grant(1)
            found += [n for n, t in self.tickets.items() if t.granted.is_set() and not t.left and n not in found]
        return found


def test_in_a_full_queue_the_more_urgent_takes_the_place_of_the_last() -> None:
    queue = Queue()
    assert queue.join("batch 1", "batch")
    assert queue.join("batch 2", "batch")
    assert not queue.join("batch 3", "batch")
    assert queue.join("normal")
    assert queue.displaced() == ["batch 2"]
    assert queue.join("interactive", "interactive")
    assert queue.displaced() == ["batch 1", "batch 2"]
    assert not queue.join("batch 4", "batch")
    assert not queue.join("normal 2")
    assert queue.order() == ["interactive", "normal"]
    # Whoever lost its place leaves nothing behind.
    queue.queue.leave("batch", queue.tickets["batch 1"])
    queue.queue.done(1.0)
    assert queue.queue.idle


def test_in_a_full_queue_a_key_that_sends_much_loses_its_last_place_to_one_that_sends_little() -> None:
    queue = Queue()
    assert queue.join("much 1", key="much")
    assert queue.join("much 2", key="much")
    assert not queue.join("much 3", key="much")
    assert queue.join("little", key="little")
    assert queue.displaced() == ["much 2"]
    assert not queue.join("little 2", key="little")
    assert queue.order() == ["much 1", "little"]


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Let this process open as many files as the test needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < SLOW_READERS + 500:
        pytest.skip(f"this process may open only {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, SLOW_READERS + 500), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_five_hundred_readers_that_take_nothing_harm_nobody(fleet: FleetFolder, server: RunningServer) -> None:
    words = 100
    with contextlib.ExitStack() as stack, queen_of(fleet, server, SLOW_READERS + 8) as queen:
        server.behave(padding_bytes=1 << 16)
        parts = urlsplit(queen.url)
        body = chat("word " * 10_000, stream=True)
        request = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        for _ in range(SLOW_READERS):
            lazy = stack.enter_context(socket.socket())
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect((parts.hostname, parts.port))
            lazy.sendall(request)
        began = time.monotonic()
        until(lambda: metric(queen, "rbee_worker_jobs") >= 0.9 * SLOW_READERS, "the readers to be served")
        server.behave(word_s=0.02)
        gaps = read_stream(queen, words)
        lazily = metric(queen, "rbee_worker_jobs")
        assert len(gaps) >= words
        # The readers were all there when the stream was at its end, unless so much time went by that they were cut.
        assert lazily >= 0.9 * SLOW_READERS or time.monotonic() - began > 30
        stack.close()
        until(lambda: metric(queen, "rbee_jobs_in_flight") == 0, "the readers' jobs to end", 120)
        assert not [line for line in queen.log if "Traceback" in line]


def read_stream(queen: RunningQueen, words: int) -> list[float]:
    """Read a stream to its good end, and return the gaps between its events."""
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=120)
    with contextlib.closing(connection):
        connection.request("POST", CHAT, chat("word " * words, stream=True))
        answer = connection.getresponse()
        assert answer.status == 200
        events, times = b"", []
        while line := answer.readline():
            events += line
            if line.startswith(b"data:"):
                times.append(time.monotonic())
        assert events.endswith(b"data: [DONE]\n\n")
        return [later - earlier for earlier, later in itertools.pairwise(times)]
