"""What is going on at a moment: `GET /v1/orchestrator/load`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from queen_rig import FleetFolder, until_state
from redis_rig import inventory, running_redis

from rbee.client import Client
from rbee.errors import AccessDenied, RbeeError
from rbee.queen.merged_load import merged
from rbee.queen.rates import Rates
from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, running_queen, until
from rbee.wire.fleet import WorkerState
from rbee.wire.load import HiveLoad, QueenLoad, QueueLoad, WorkerLoad

CHAT = "/v1/chat/completions"
T = TypeVar("T")
WORDS = 80


class Counts:
    """Counts that a test sets, and a clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.counts: dict[str, float] = {}
        self.rates = Rates(lambda: dict(self.counts), lambda: self.now)

    def second(self, **counts: float) -> dict[str, float]:
        """Let a second pass, in which counts come to be these, and return the rates."""
        self.rates.look()
        self.now += 1.0
        self.counts = counts
        return self.rates.per_second()[0]


def test_rates_are_those_of_the_last_seconds() -> None:
    counts = Counts()
    assert counts.rates.per_second() == ({}, 0.0)
    assert counts.second(jobs=10) == {"jobs": 10.0}
    assert counts.second(jobs=10) == {"jobs": 5.0}
    for _ in range(10):
        counts.second(jobs=10)
    assert counts.second(jobs=10) == {"jobs": 0.0}
    assert counts.rates.per_second()[1] == 5.0


def test_a_worker_that_comes_goes_or_is_replaced_has_no_odd_rate() -> None:
    counts = Counts()
    counts.second(old=1000)
    assert counts.second(old=1000, new=20)["new"] == 10.0
    assert counts.second(old=6)["old"] == 2.0, "a worker of the same name began anew"
    assert "new" not in counts.rates.per_second()[0]


def seen(process: int, *, tokens: float, ttft_ms: float, waiting: int) -> QueenLoad:
    """Return what one server process tells of a worker that all know."""
    worker = WorkerLoad(
        id="a/w", model="m", backend="b", device="cpu", state=WorkerState.READY, slots=4,
        in_flight=3, elsewhere=process,
        tokens_per_second=tokens, ttft_ms=ttft_ms, ejected=process == 1,
    )  # fmt: skip
    queue = QueueLoad(model="m", priority="batch", waiting=waiting, longest_wait_s=float(waiting))
    return QueenLoad(
        version="1", url="", pid=process, at=1.0, started_at=0.0, in_flight=1 + process, waiting=waiting,
        tokens_per_second=tokens, jobs_per_second=0.5, hives=[HiveLoad(hive="a", state="ready", workers=[worker])],
        queues=[queue] if waiting else [],
    )  # fmt: skip


def test_several_processes_are_told_of_as_one() -> None:
    told = merged([seen(0, tokens=10, ttft_ms=0, waiting=2), seen(1, tokens=5, ttft_ms=30, waiting=3)])
    assert (told.pid, told.in_flight, told.waiting) == (0, 3, 5)
    assert (told.tokens_per_second, told.jobs_per_second) == (15.0, 1.0)
    [worker] = told.hives[0].workers
    assert (worker.in_flight, worker.tokens_per_second, worker.ttft_ms, worker.ejected) == (5, 15.0, 30.0, True)
    assert told.queues == [QueueLoad(model="m", priority="batch", waiting=5, longest_wait_s=3.0)]
    alone = seen(0, tokens=1, ttft_ms=1, waiting=0)
    assert merged([alone]) is alone


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


@pytest.fixture
def queen(fleet: FleetFolder, server: RunningServer) -> Iterator[RunningQueen]:
    """Return a queen with one server of one slot."""
    fleet.write(shed=["HivePort none", "Region eu", f"Worker w url={server.url} model=honey slots=1"])
    with running_queen("--no-hive", "--inventory", str(fleet.folder)) as running:
        until_state(running, "shed", "ready")
        yield running


def load(queen: RunningQueen) -> QueenLoad:
    return load_by(queen.client)


def load_by(client: Client) -> QueenLoad:
    return client.get("/v1/orchestrator/load", QueenLoad)


def chat(queen: RunningQueen, **more: object) -> None:
    chat_by(queen.client, **more)


def chat_by(client: Client, **more: object) -> None:
    messages = [{"role": "user", "content": "word " * WORDS}]
    body = {"model": "honey", "stream": True, "messages": messages, **more}
    answer = client.send("POST", CHAT, body)
    while answer.next(60.0):
        pass


def test_workers_queues_and_rates_are_told_while_jobs_run(queen: RunningQueen, server: RunningServer) -> None:
    assert load(queen).hives[0].workers[0].state is WorkerState.READY
    server.behave(word_s=0.05)
    jobs = [
        threading.Thread(target=chat, args=(queen,), kwargs={"priority": priority})
        for priority in ("interactive", "normal", "batch", "batch")
    ]
    for job in jobs:
        job.start()
    told = load(queen)

    def under_way() -> bool:
        nonlocal told
        told = load(queen)
        return told.waiting == 3 and told.tokens_per_second > 0

    until(under_way, "three to wait, and one to stream")
    assert told.in_flight == 4
    [hive] = told.hives
    assert (hive.hive, hive.state, hive.region) == ("shed", "ready", "eu")
    [worker] = hive.workers
    assert (worker.id, worker.model, worker.in_flight, worker.slots) == ("shed/w", "honey", 1, 1)
    # A word comes every 0.05 s; a window as short as the first ones holds a few events more than its share.
    assert 0 < worker.tokens_per_second * told.window_s <= told.window_s / 0.05 + 4
    assert worker.tokens_per_second == told.tokens_per_second
    assert worker.ttft_ms > 0
    waits = {queue.priority: queue for queue in told.queues}
    assert sum(queue.waiting for queue in waits.values()) == 3
    assert waits["batch"].waiting == 2
    assert all(queue.model == "honey" and queue.longest_wait_s > 0 for queue in waits.values())
    server.behave(word_s=0.0)
    for job in jobs:
        job.join()
    until(lambda: load(queen).jobs_per_second > 0, "the jobs to be counted")
    assert (load(queen).in_flight, load(queen).waiting, load(queen).queues) == (0, 0, [])


def test_refused_requests_ejected_workers_and_problems_are_told(queen: RunningQueen, server: RunningServer) -> None:
    for _ in range(3):
        with pytest.raises(RbeeError):
            chat(queen, model="nobody-has-this")
    until(lambda: load(queen).refused_per_second > 0, "the refusals to be counted")
    server.behave(answer="error")
    for _ in range(5):
        with pytest.raises(RbeeError):
            chat(queen)
    assert load(queen).hives[0].workers[0].ejected
    server.process.kill()
    with pytest.raises(RbeeError):
        chat(queen)
    until(lambda: load(queen).hives[0].workers[0].lost, "the server to be missed")
    until(lambda: "shed/w" in {problem.where for problem in load(queen).problems}, "the reason to be told")


def test_only_the_operator_may_look(queen: RunningQueen) -> None:
    stranger = Client(queen.url)
    with pytest.raises(RbeeError) as refused:
        stranger.get("/v1/orchestrator/load", QueenLoad)
    stranger.close()
    assert refused.value.status == AccessDenied.status


def test_two_server_processes_answer_for_both(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        redis, server = stack.enter_context(running_redis()), stack.enter_context(running_server("echo", word_s=0.05))
        words = ("--no-hive", "--inventory", str(inventory(tmp_path / "inventory", w=server.url)))
        queen = stack.enter_context(running_queen(*words, "--processes", "2", "--state", redis.url))
        until(lambda: len(queen.status().processes) == 2, "both processes to answer")
        until(lambda: all(ready(queen) for _ in range(10)), "both to know the server")
        jobs = [threading.Thread(target=fresh, args=(queen, chat_by), kwargs={"model": "echo"}) for _ in range(8)]
        for job in jobs:
            job.start()
        until(lambda: fresh(queen, load_by).in_flight == 8, "all to run")
        told = [fresh(queen, load_by) for _ in range(10)]
        assert {(one.in_flight, one.hives[0].workers[0].in_flight) for one in told} == {(8, 8)}, "whoever is asked"
        until(lambda: fresh(queen, load_by).tokens_per_second > 0, "their tokens to be counted")
        for job in jobs:
            job.join()


def fresh(queen: RunningQueen, ask: Callable[..., T], **more: object) -> T:
    """Ask on a connection of its own, which either process may take."""
    with contextlib.closing(Client(queen.url, token=queen.record.token, timeout_s=30.0)) as client:
        return ask(client, **more)


def ready(queen: RunningQueen) -> bool:
    return any(worker.state is WorkerState.READY for hive in fresh(queen, load_by).hives for worker in hive.workers)
