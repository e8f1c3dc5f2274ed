"""Workers that fail are left out, but never the last of a model; retries are bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from queen_rig import FleetFolder, view

from rbee.errors import RbeeError
from rbee.queen.ejection import FAILURES, FEW_RETRIES, FIRST_PAUSE_S, LONGEST_PAUSE_S, WINDOW_S, Ejection, RetryBudget
from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, running_queen, until

CHAT = "/v1/chat/completions"


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ejected(clock: Clock) -> Ejection:
    ejection = Ejection(now=clock)
    for _ in range(FAILURES):
        assert not ejection.ejected
        ejection.failed()
    assert ejection.ejected
    return ejection


def test_only_failures_in_a_row_eject(clock: Clock) -> None:
    ejection = Ejection(now=clock)
    for _ in range(3 * FAILURES):
        ejection.failed()
        ejection.began()
        ejection.succeeded()
    assert not ejection.ejected


def test_after_the_pause_one_job_at_a_time_tries_it(clock: Clock) -> None:
    ejection = ejected(clock)
    clock.now += FIRST_PAUSE_S
    seen = [ejection.ejected]
    ejection.sent()
    seen.append(ejection.ejected)
    ejection.began()
    assert [*seen, ejection.ejected] == [False, True, False]


def test_a_probe_that_fails_makes_the_pause_longer_up_to_a_bound(clock: Clock) -> None:
    ejection, pauses = ejected(clock), []
    for _ in range(8):
        began = clock.now
        while ejection.ejected:
            clock.now += 0.5
        pauses.append(clock.now - began)
        ejection.sent()
        ejection.failed()
    assert pauses == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0]
    assert pauses[-1] == LONGEST_PAUSE_S


def test_a_probe_whose_client_leaves_lets_the_next_job_try(clock: Clock) -> None:
    ejection = ejected(clock)
    clock.now += FIRST_PAUSE_S
    ejection.sent()
    ejection.dropped()
    assert not ejection.ejected


def test_jobs_that_end_after_the_ejection_do_not_make_it_longer(clock: Clock) -> None:
    ejection = ejected(clock)
    for _ in range(20):
        ejection.failed()
    clock.now += FIRST_PAUSE_S
    assert not ejection.ejected


def test_retries_are_a_fifth_of_the_jobs(clock: Clock) -> None:
    budget = RetryBudget(now=clock)
    for _ in range(1000):
        budget.count()
    assert [budget.take() for _ in range(201)] == [True] * 200 + [False]
    clock.now += WINDOW_S
    assert [budget.take() for _ in range(FEW_RETRIES + 1)] == [True] * FEW_RETRIES + [False]


@pytest.fixture
def servers() -> Iterator[list[RunningServer]]:
    """Return two servers of one model; the first is the built-in script's first choice."""
    with running_server() as first, running_server() as second:
        yield [first, second]


@pytest.fixture
def queen(fleet: FleetFolder, servers: list[RunningServer]) -> Iterator[RunningQueen]:
    lines = [f"Worker s{number} model=honey url={server.url}" for number, server in enumerate(servers)]
    fleet.write(desk=["HivePort none", *lines])
    with running_queen("--no-hive", "--inventory", str(fleet.folder)) as running:
        until(lambda: ready(running) == 2, "both servers to answer")
        yield running


def ready(queen: RunningQueen) -> int:
    shown = view(queen, "desk")
    return sum(one.state == "ready" for one in shown.workers) if shown else 0


def ask(queen: RunningQueen, text: str = "one two") -> str:
    body = {"model": "honey", "messages": [{"role": "user", "content": text}]}
    return str(queen.client.post(CHAT, body, dict[str, Any])["choices"][0]["message"]["content"])


def metric(queen: RunningQueen, start: str) -> float:
    lines = queen.client.send("GET", "/metrics").read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


def test_a_server_that_always_fails_is_ejected_unseen_by_clients_and_returns(
    queen: RunningQueen, servers: list[RunningServer]
) -> None:
    bad, good = servers
    bad.behave(answer="error")
    for _ in range(FAILURES + 5):
        assert ask(queen) == "one two"
        if metric(queen, "rbee_worker_ejected"):
            break
    assert metric(queen, 'rbee_worker_ejected{hive="desk",worker="s0"}') == 1
    assert bad.told().jobs == FAILURES
    assert metric(queen, "rbee_job_retries_total") == FAILURES
    bad.behave(answer="ok")
    until(lambda: ask(queen) and bad.told().jobs > FAILURES, "the server to be tried again")
    assert metric(queen, "rbee_worker_ejected") == 0
    assert good.told().jobs >= FAILURES


def test_the_last_server_is_never_ejected(queen: RunningQueen, servers: list[RunningServer]) -> None:
    for server in servers:
        server.behave(answer="error")
    for _ in range(4 * FAILURES):
        with pytest.raises(RbeeError, match="this server is broken") as found:
            ask(queen)
        assert found.value.status == 500
    for server in servers:
        server.behave(answer="ok")
    # The very next job: nothing has to time out first.
    assert ask(queen) == "one two"


def test_a_full_server_is_passed_over_and_not_ejected(queen: RunningQueen, servers: list[RunningServer]) -> None:
    full, _ = servers
    full.behave(answer="busy")
    for _ in range(2 * FAILURES):
        assert ask(queen) == "one two"
    assert metric(queen, "rbee_worker_ejected") == 0


def test_a_job_is_sent_to_two_workers_at_most(queen: RunningQueen, servers: list[RunningServer]) -> None:
    for server in servers:
        server.behave(answer="error")
    before = [server.told().jobs for server in servers]
    with pytest.raises(RbeeError, match="this server is broken"):
        ask(queen)
    assert [server.told().jobs - jobs for server, jobs in zip(servers, before, strict=True)] == [1, 1]


def test_a_whole_answer_that_is_cut_is_asked_for_anew(queen: RunningQueen, servers: list[RunningServer]) -> None:
    servers[0].behave(answer="break")
    assert ask(queen, "word " * 50).count("word") == 50
    assert servers[1].told().jobs == 1
    assert metric(queen, "rbee_job_retries_total") == 1


def test_a_refused_key_of_the_queen_is_not_told_as_the_clients(fleet: FleetFolder, tmp_path: Any) -> None:
    (tmp_path / "key").write_text("sesame")
    with running_server(key="sesame") as server:
        fleet.write(desk=["HivePort none", f"Worker s model=honey url={server.url} key-file={tmp_path / 'key'}"])
        with running_queen("--no-hive", "--inventory", str(fleet.folder)) as queen:
            until(lambda: ready(queen) == 1, "the server to answer")
            (tmp_path / "key").write_text("other")
            with pytest.raises(RbeeError) as found:
                ask(queen)
            assert found.value.status in (502, 503)
            assert "key" in str(found.value)
