"""Limits that several processes count together, against a real Redis and a clock of the test's own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest
from redis_rig import RunningRedis, running_redis

from rbee.errors import QuotaExhausted, RateLimited
from rbee.queen.limits import Charge
from rbee.queen.link import Link
from rbee.queen.policy import Policy
from rbee.queen.shared_limits import SharedLimits

NOON = 1_795_262_400.0
LEASE_S = 3.0


class Clock:
    """Seconds that pass when the test says so, for the processes and in the shared script."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


class Process:
    """One process' limits and its link, as `shared.Shared` puts them together."""

    def __init__(self, name: str, folder: Path, redis: RunningRedis, clock: Clock) -> None:
        self.clock = clock
        self.limits = SharedLimits(folder / f"{name}.json", clock=clock, today=clock)
        self.link = Link(redis.url, "", f"{name}-1", on_up=self._joined, on_down=self.limits.forget)
        self.limits.link = self.link
        self._redis = redis
        self.name = name

    def _joined(self, exchange: object) -> None:
        self.link.clock = str(self.clock())
        [(epoch, _)] = exchange([self.link.join(secrets.token_hex(8), "token", LEASE_S, f"{self.name}-")])  # type: ignore[operator]
        self.link.epoch = epoch.decode()
        self.limits.catch_up(exchange)  # type: ignore[arg-type]

    def start(self) -> None:
        self.link.start(30.0)
        assert self.link.up, self.link.problem

    def enter(self, identity: str, policy: Policy, tokens: int = 0) -> Charge:
        self.link.clock = str(self.clock())
        charge = self.limits.enter(identity, policy, tokens)
        assert charge is not None
        return charge

    def beat(self) -> list[int]:
        """Show a sign of life; return whether this process was known, and how many jobs of dead ones it gave back."""
        self.link.clock = str(self.clock())
        known: list[int] = self.link.call(self.link.command("beat", LEASE_S))
        return known

    def until_up(self) -> None:
        """Wait until the state is reached again."""
        with gevent.Timeout(60):
            while not self.link.up:
                gevent.sleep(0.01)

    def until_away(self) -> None:
        """Wait until the state is known to be away."""
        with gevent.Timeout(60):
            while self.link.up:
                self.link.send(("PING",))
                gevent.sleep(0.01)

    def end(self) -> None:
        self.link.stop()


@pytest.fixture
def redis() -> Iterator[RunningRedis]:
    with running_redis() as running:
        yield running


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def two(tmp_path: Path, redis: RunningRedis, clock: Clock) -> Iterator[tuple[Process, Process]]:
    both = Process("a", tmp_path, redis, clock), Process("b", tmp_path, redis, clock)
    for one in both:
        one.start()
    yield both
    for one in both:
        one.end()


def refused(process: Process, identity: str, policy: Policy, tokens: int = 0) -> RateLimited:
    """Return why a job is refused."""
    with pytest.raises(RateLimited) as found:
        process.enter(identity, policy, tokens)
    return found.value


def test_a_rate_is_one_for_all_and_refills(two: tuple[Process, Process], clock: Clock) -> None:
    a, b = two
    policy = Policy(requests_per_minute=4)
    for process in (a, b, a, b):
        process.limits.settle(process.enter("key", policy), 0)
    for process in two:
        problem = refused(process, "key", policy)
        assert str(problem) == (
            "Rate limit reached for requests a minute: limit 4, requested 1. Please try again in 15s"
        )
        assert problem.retry_after_s == 15
    clock.now += 15
    b.enter("key", policy)
    refused(a, "key", policy)
    assert a.limits.headers("key", policy)["x-ratelimit-remaining-requests"] == "0"


def test_jobs_at_once_are_counted_everywhere(two: tuple[Process, Process]) -> None:
    a, b = two
    policy = Policy(concurrency=2)
    first, _ = a.enter("key", policy), b.enter("key", policy)
    assert str(refused(b, "key", policy)) == ("This key has 2 jobs at once, which is its limit. Try: one after another")
    refused(a, "key", policy)
    a.limits.settle(first, 0)
    a.limits.settle(first, 0)
    b.enter("key", policy)
    refused(a, "key", policy)


def test_tokens_are_reserved_and_settled_for_all(two: tuple[Process, Process]) -> None:
    a, b = two
    policy = Policy(tokens_per_minute=100)
    charge = a.enter("key", policy, 90)
    refused(b, "key", policy, 20)
    a.limits.settle(charge, 10)
    gevent.sleep(0)
    b.limits.settle(b.enter("key", policy, 90), 90)
    assert "limit 100, requested 1." in str(refused(a, "key", policy, 1))


def test_a_budget_is_one_for_all_and_begins_anew_with_the_day(two: tuple[Process, Process], clock: Clock) -> None:
    a, b = two
    policy = Policy(requests_per_day=2, tokens_per_month=100)
    a.limits.settle(a.enter("key", policy, 10), 60)
    b.limits.settle(b.enter("key", policy, 10), 10)
    with pytest.raises(QuotaExhausted, match="2 of 2 requests of a day are used, this request needs 1"):
        a.enter("key", policy)
    clock.now += 86_400
    with pytest.raises(QuotaExhausted, match="70 of 100 tokens of a month are used, this request needs 40"):
        b.enter("key", policy, 40)
    a.enter("key", policy, 30)


def test_what_a_dead_process_held_is_given_back_once(two: tuple[Process, Process], clock: Clock) -> None:
    a, b = two
    policy = Policy(concurrency=3, tokens_per_minute=100)
    a.enter("key", policy, 40)
    a.enter("key", policy, 40)
    clock.now += LEASE_S - 1
    assert b.beat() == [1, 0]
    clock.now += 2
    assert b.beat() == [1, 2]
    assert b.beat() == [1, 0]
    for _ in range(3):
        b.enter("key", policy, 30)
    assert "3 jobs at once" in str(refused(b, "key", policy))


def test_a_process_that_was_only_silent_holds_its_jobs_again(two: tuple[Process, Process], clock: Clock) -> None:
    a, b = two
    policy = Policy(concurrency=1)
    charge = a.enter("key", policy)
    clock.now += LEASE_S + 1
    assert b.beat() == [1, 1]
    assert a.beat() == [0, 0]
    a.limits.hold_again()
    a.beat()
    refused(b, "key", policy)
    a.limits.settle(charge, 0)
    b.enter("key", policy)


def test_a_process_that_was_cut_off_holds_its_jobs_again(
    two: tuple[Process, Process], clock: Clock, redis: RunningRedis
) -> None:
    a, b = two
    policy = Policy(concurrency=1)
    charge = a.enter("key", policy)
    clock.now += LEASE_S + 1
    assert b.beat() == [1, 1]
    with redis.client() as client:
        client.client_kill_filter(_type="normal", skipme=True)
    for process in two:
        process.until_away()
    for process in two:
        process.until_up()
    refused(b, "key", policy)
    a.limits.settle(charge, 0)
    b.enter("key", policy)


def test_a_successor_gives_back_at_once_what_its_slot_held(
    tmp_path: Path, redis: RunningRedis, clock: Clock, two: tuple[Process, Process]
) -> None:
    a, b = two
    policy = Policy(concurrency=1)
    a.enter("key", policy)
    a.end()
    successor = Process("a", tmp_path, redis, clock)
    successor.link.process = "a-2"
    successor.start()
    b.enter("key", policy)
    successor.end()


def test_while_the_state_is_away_each_goes_on_alone_and_then_all_is_merged(
    two: tuple[Process, Process], redis: RunningRedis
) -> None:
    a, b = two
    policy = Policy(requests_per_day=10, concurrency=3)
    before = a.enter("key", policy, 5)
    with redis.stopped():
        for process in two:
            process.until_away()
        a.limits.settle(before, 7)
        alone = a.enter("key", policy, 5)
        b.limits.settle(b.enter("key", policy, 5), 11)
        # What the others hold cannot be known: two more here are allowed.
        b.limits.settle(b.enter("key", policy, 5), 0)
    for process in two:
        process.until_up()
    with redis.client() as client:
        account = client.hgetall("rbee:account:key")
    assert (account[b"day_requests"], account[b"day_tokens"]) == (b"4", b"18")
    assert (account[b"in_flight"], account[b"reserved"]) == (b"1", b"5")
    a.limits.settle(alone, 2)
    for _ in range(6):
        b.limits.settle(b.enter("key", policy), 0)
    with pytest.raises(QuotaExhausted, match="10 of 10 requests of a day"):
        a.enter("key", policy)


def test_a_state_that_has_lost_everything_is_reminded(two: tuple[Process, Process], redis: RunningRedis) -> None:
    a, b = two
    policy = Policy(requests_per_day=10, concurrency=2)
    a.limits.settle(a.enter("key", policy), 0)
    held = b.enter("key", policy)
    redis.kill()
    for process in two:
        process.until_away()
    b.limits.settle(b.enter("key", policy), 9)
    redis.start()
    for process in two:
        process.until_up()
    with redis.client() as client:
        account = client.hgetall("rbee:account:key")
    assert (account[b"day_requests"], account[b"day_tokens"], account[b"in_flight"]) == (b"3", b"9", b"1")
    a.enter("key", policy)
    refused(a, "key", policy)
    b.limits.settle(held, 0)
    a.enter("key", policy)


def test_an_operation_without_an_answer_counts_once(two: tuple[Process, Process], redis: RunningRedis) -> None:
    a, b = two
    policy = Policy(requests_per_day=100, concurrency=5)
    jobs: list[gevent.Greenlet[..., Charge]] = []
    with redis.stopped():
        # Redis has the bytes of these, takes them when it goes on, and nobody is there to hear the answer.
        jobs = [gevent.spawn(a.enter, "key", policy, 1) for _ in range(3)]
        gevent.joinall(jobs, timeout=60)
        charges = [job.get() for job in jobs]
        a.limits.settle(charges[0], 4)
    a.until_up()
    b.until_up()
    with redis.client() as client:
        account = client.hgetall("rbee:account:key")
    assert (account[b"day_requests"], account[b"in_flight"], account[b"day_tokens"]) == (b"3", b"2", b"4")
    for charge in charges[1:]:
        a.limits.settle(charge, 0)
    for _ in range(5):
        b.enter("key", policy)
    refused(a, "key", policy)


def test_a_state_that_hangs_costs_one_short_wait(two: tuple[Process, Process], redis: RunningRedis) -> None:
    a, _ = two
    policy = Policy(requests_per_minute=1000)
    waits = 0
    with redis.stopped():
        for _ in range(50):
            waits += a.link.up
            a.limits.settle(a.enter("key", policy), 0)
    assert waits <= 2


def test_budgets_outlive_queens_and_redis(tmp_path: Path, redis: RunningRedis, clock: Clock) -> None:
    policy = Policy(requests_per_month=3)
    first = Process("a", tmp_path, redis, clock)
    first.start()
    for _ in range(2):
        first.limits.settle(first.enter("key", policy), 0)
    first.limits.save()
    first.end()
    redis.kill()
    redis.start()
    second = Process("a", tmp_path, redis, clock)
    second.start()
    second.enter("key", policy)
    with pytest.raises(QuotaExhausted, match="3 of 3 requests of a month"):
        second.enter("key", policy)
    second.end()
