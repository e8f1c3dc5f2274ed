"""Rates, budgets and concurrency of a key, on clocks of the test's own."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from rbee.errors import InvalidInput, QuotaExhausted, RateLimited
from rbee.queen.limits import Limits, duration
from rbee.queen.policy import Policy, policy_of

NOON = datetime.datetime(2026, 11, 29, 12, tzinfo=datetime.UTC).timestamp()
DAY_S = 86_400.0


class Clock:
    """Seconds on both clocks."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def limits(self, path: Path | None = None) -> Limits:
        return Limits(path, clock=lambda: self.now_s, today=lambda: NOON + self.now_s - 1000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_requests_a_minute_run_out_and_come_back_steadily(clock: Clock) -> None:
    limits, policy = clock.limits(), Policy(requests_per_minute=6)
    for _ in range(6):
        limits.enter("k", policy, 0)
    with pytest.raises(RateLimited, match=r"requests a minute: limit 6.*try again in 10s") as refused:
        limits.enter("k", policy, 0)
    assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (429, "rate_limit_exceeded", 10)
    limits.enter("another", policy, 0)
    clock.now_s += 10
    limits.enter("k", policy, 0)
    with pytest.raises(RateLimited):
        limits.enter("k", policy, 0)


def test_tokens_are_reserved_and_then_settled_by_what_was_used(clock: Clock) -> None:
    limits, policy = clock.limits(), Policy(tokens_per_minute=1000)
    charge = limits.enter("k", policy, 900)
    with pytest.raises(RateLimited, match="tokens a minute"):
        limits.enter("k", policy, 200)
    limits.settle(charge, 100)
    limits.settle(charge, 100)
    assert limits.headers("k", policy)["x-ratelimit-remaining-tokens"] == "900"
    limits.enter("k", policy, 200)


def test_a_job_larger_than_a_minute_goes_when_the_minute_is_whole(clock: Clock) -> None:
    limits, policy = clock.limits(), Policy(tokens_per_minute=600)
    limits.enter("k", policy, 1200)
    clock.now_s += 60
    with pytest.raises(RateLimited):
        limits.enter("k", policy, 600)
    clock.now_s += 60
    limits.enter("k", policy, 600)


def test_refusing_charges_nothing(clock: Clock) -> None:
    limits, policy = clock.limits(), Policy(requests_per_minute=10, tokens_per_minute=100)
    limits.enter("k", policy, 100)
    for _ in range(20):
        with pytest.raises(RateLimited, match="tokens"):
            limits.enter("k", policy, 50)
    assert limits.headers("k", policy)["x-ratelimit-remaining-requests"] == "9"


def test_jobs_at_once_are_bounded(clock: Clock) -> None:
    limits, policy = clock.limits(), Policy(concurrency=2)
    first = limits.enter("k", policy, 0)
    limits.enter("k", policy, 0)
    with pytest.raises(RateLimited, match="2 jobs at once"):
        limits.enter("k", policy, 0)
    limits.settle(first, 0)
    limits.enter("k", policy, 0)


def test_a_budget_ends_with_its_day_and_month(clock: Clock) -> None:
    limits, policy = clock.limits(), Policy(tokens_per_day=100, tokens_per_month=150)
    limits.settle(limits.enter("k", policy, 10), 95)
    with pytest.raises(QuotaExhausted, match="95 of 100 tokens of a day") as refused:
        limits.enter("k", policy, 10)
    assert (refused.value.code, refused.value.type, refused.value.retry_after_s) == (
        "insufficient_quota", "insufficient_quota", DAY_S / 2,
    )  # fmt: skip
    clock.now_s += DAY_S / 2  # the 30th
    limits.settle(limits.enter("k", policy, 10), 50)
    with pytest.raises(QuotaExhausted, match="145 of 150 tokens of a month"):
        limits.enter("k", policy, 10)
    clock.now_s += DAY_S  # December
    limits.enter("k", policy, 100)


def test_what_runs_counts_against_the_budget(clock: Clock) -> None:
    limits, policy = clock.limits(), Policy(tokens_per_day=100)
    limits.enter("k", policy, 60)
    with pytest.raises(QuotaExhausted):
        limits.enter("k", policy, 60)


def test_a_clock_that_is_set_back_gives_no_new_budget(clock: Clock) -> None:
    limits, policy = clock.limits(), Policy(requests_per_day=1)
    limits.enter("k", policy, 0)
    clock.now_s -= 2 * DAY_S
    with pytest.raises(QuotaExhausted):
        limits.enter("k", policy, 0)


def test_budgets_outlive_the_process_and_rates_need_not(clock: Clock, tmp_path: Path) -> None:
    policy = Policy(requests_per_day=2, requests_per_minute=60)
    limits = clock.limits(tmp_path / "limits.json")
    for _ in range(2):
        limits.enter("k", policy, 0)
    limits.save()
    again = clock.limits(tmp_path / "limits.json")
    with pytest.raises(QuotaExhausted, match="2 of 2"):
        again.enter("k", policy, 0)
    again.enter("other", policy, 0)
    again.save()
    with pytest.raises(QuotaExhausted):
        clock.limits(tmp_path / "limits.json").enter("k", policy, 0)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"k": 3}', b"\xff\xfe"])
def test_a_damaged_file_of_budgets_does_not_stop_the_queen(clock: Clock, tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "limits.json").write_bytes(damage)
    limits = clock.limits(tmp_path / "limits.json")
    limits.enter("k", Policy(requests_per_day=2), 0)
    limits.save()
    clock.limits(tmp_path / "limits.json").enter("k", Policy(requests_per_day=2), 0)


def test_a_disk_that_refuses_stops_no_counting(clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limits, policy = clock.limits(tmp_path / "missing" / "limits.json"), Policy(requests_per_day=1)
    limits.enter("k", policy, 0)
    limits.save()
    assert "cannot save" in caplog.text
    with pytest.raises(QuotaExhausted):
        limits.enter("k", policy, 0)
    (tmp_path / "missing").mkdir()
    limits.save()
    with pytest.raises(QuotaExhausted):
        clock.limits(tmp_path / "missing" / "limits.json").enter("k", policy, 0)


def test_a_limit_that_is_set_or_raised_counts_at_once(clock: Clock) -> None:
    limits = clock.limits()
    limits.enter("k", Policy(concurrency=9), 0)
    for _ in range(5):
        limits.enter("k", Policy(requests_per_minute=5), 0)
    with pytest.raises(RateLimited):
        limits.enter("k", Policy(requests_per_minute=5), 0)
    clock.now_s += 1
    limits.enter("k", Policy(requests_per_minute=600), 0)


def test_headers_are_those_of_openai(clock: Clock) -> None:
    limits, policy = clock.limits(), Policy(requests_per_minute=60, tokens_per_minute=6000)
    limits.enter("k", policy, 3000)
    assert limits.headers("k", policy) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "3000",
        "x-ratelimit-reset-tokens": "30s",
    }
    assert limits.headers("k", Policy(concurrency=1)) == {}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.02, "20ms"), (1.5, "1.5s"), (59.96, "60s"), (360, "6m0s"), (3599.9, "60m0s")]
)
def test_times_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_key_without_limits_costs_no_account(clock: Clock) -> None:
    limits = clock.limits()
    assert limits.enter("k", Policy(tenant="t"), 5) is None
    limits.settle(None, 5)


@pytest.mark.parametrize("field", [{"tenant": "a b"}, {"requests_per_minute": -1}, {"priority": "urgent"}, {"x": 1}])
def test_a_wrong_policy_names_its_field(field: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(field))):
        policy_of(field)


def test_models_and_priorities_of_a_policy() -> None:
    policy = Policy(models=("qwen*", "echo"), priority="normal")
    assert [policy.allows(name) for name in ("qwen3-8b", "echo", "llama", "QWEN")] == [True, True, False, False]
    assert [policy.urgency(wanted) for wanted in (None, "interactive", "normal", "batch")] == [
        "normal", "normal", "normal", "batch",
    ]  # fmt: skip
