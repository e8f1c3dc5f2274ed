"""What each identity has used of its rates and budgets: counted in memory, remembered on disk.

A rate is a token bucket that holds one minute's worth and refills steadily. A budget counts within a day or month of
UTC. A job's tokens are reserved by an estimate when it enters and settled by what it used when it ends.
"""

from __future__ import annotations

import atexit
import calendar
import datetime
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gevent
import msgspec
from msgspec import Struct

from rbee import paths
from rbee.errors import QuotaExhausted, RateLimited
from rbee.queen.policy import Policy

log = logging.getLogger("rbee.queen.limits")

SAVE_EVERY_S = 5.0
MAX_ACCOUNTS = 50_000
MINUTE_S = 60.0


class Spent(Struct):
    """What an identity has spent in the day and month that these began at, in seconds since the epoch."""

    day: float = 0.0
    month: float = 0.0
    day_requests: int = 0
    day_tokens: int = 0
    month_requests: int = 0
    month_tokens: int = 0


@dataclass(slots=True)
class Bucket:
    """What is left of one minute's worth; endless before a limit is first looked at. `at` is on the monotonic clock."""

    left: float
    at: float

    def fill(self, per_minute: int, now: float) -> float:
        """Return what is left at `now`. A limit that was raised or lowered counts at once."""
        self.left = min(float(per_minute), self.left + (now - self.at) * per_minute / MINUTE_S)
        self.at = now
        return self.left


@dataclass(slots=True)
class Account:
    """The live state of one identity."""

    requests: Bucket
    tokens: Bucket
    spent: Spent
    in_flight: int = 0
    reserved: int = 0


@dataclass(slots=True)
class Charge:
    """What a job reserved; it is settled once."""

    account: Account
    policy: Policy
    tokens: int
    settled: bool = field(default=False)


class Limits:
    """The accounts of one server process."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        today: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._clock = clock
        self._today = today
        self._accounts: OrderedDict[str, Account] = OrderedDict()
        self._remembered = _read(path) if path else {}
        self._changed = False

    def enter(self, identity: str, policy: Policy, tokens: int) -> Charge | None:
        """Charge a job that is estimated to take so many tokens, or nothing when no limit is set.

        Raises: RateLimited, QuotaExhausted; then nothing is charged.
        """
        if not policy.limited:
            return None
        account = self._account(identity, policy)
        self.check(account, policy, tokens)
        account.requests.left -= 1
        account.tokens.left -= tokens
        account.spent.day_requests += 1
        account.spent.month_requests += 1
        account.in_flight += 1
        account.reserved += tokens
        self._changed = True
        return Charge(account, policy, tokens)

    def check(self, account: Account, policy: Policy, tokens: int) -> None:
        """Refuse a job that is over a limit. Raises: RateLimited, QuotaExhausted."""
        _check_concurrency(account, policy)
        self._check_budgets(account, policy, tokens)
        _check_rates(account, policy, tokens, self._clock())

    def settle(self, charge: Charge | None, used_tokens: int) -> None:
        """Count what a job really used, which may be nothing."""
        if charge is None or charge.settled:
            return
        charge.settled = True
        account = charge.account
        account.in_flight -= 1
        account.reserved -= charge.tokens
        account.tokens.left += charge.tokens - used_tokens
        self._turn(account.spent)
        account.spent.day_tokens += used_tokens
        account.spent.month_tokens += used_tokens
        self._changed = True

    def headers(self, identity: str, policy: Policy) -> dict[str, str]:
        """Return OpenAI's rate-limit headers (platform.openai.com/docs/guides/rate-limits, "in headers")."""
        if not policy.requests_per_minute and not policy.tokens_per_minute:
            return {}
        account, now = self._account(identity, policy), self._clock()
        told: dict[str, str] = {}
        for name, limit, bucket in (
            ("requests", policy.requests_per_minute, account.requests),
            ("tokens", policy.tokens_per_minute, account.tokens),
        ):
            if limit:
                left = bucket.fill(limit, now)
                told[f"x-ratelimit-limit-{name}"] = str(limit)
                told[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(left)))
                told[f"x-ratelimit-reset-{name}"] = duration((limit - left) * MINUTE_S / limit)
        return told

    def keep(self) -> None:
        """Save what has changed every few seconds, off the event loop, and at the end of the process."""
        atexit.register(self.save)
        while True:
            gevent.sleep(SAVE_EVERY_S)
            if self._changed:
                self._changed = False
                if not gevent.get_hub().threadpool.apply(self._write, (self._snapshot(),)):
                    self._changed = True

    def save(self) -> None:
        """Write what identities have spent of their budgets."""
        if self._changed:
            self._write(self._snapshot())

    def _snapshot(self) -> bytes:
        live = {name: account.spent for name, account in self._accounts.items() if account.spent.month_requests}
        return msgspec.json.encode({**self._remembered, **live})

    def _write(self, data: bytes) -> bool:
        """Return False when the disk refuses; budgets are counted on, and saved when it takes them again."""
        assert self._path is not None
        try:
            paths.write_private(self._path, data)
        except OSError as problem:
            log.warning("cannot save what keys have used: %s", problem)
            return False
        return True

    def _account(self, identity: str, policy: Policy) -> Account:
        account = self._accounts.get(identity)
        if account is None:
            now = self._clock()
            account = self._accounts[identity] = Account(
                Bucket(math.inf, now),
                Bucket(math.inf, now),
                self._remembered.get(identity) or Spent(),
            )
            self._forget_idle()
        else:
            self._accounts.move_to_end(identity)
        self._turn(account.spent)
        return account

    def _forget_idle(self) -> None:
        """Keep the memory bounded; what was spent is remembered."""
        if len(self._accounts) > MAX_ACCOUNTS:
            name, oldest = next(iter(self._accounts.items()))
            if not oldest.in_flight:
                del self._accounts[name]
                self._remembered[name] = oldest.spent

    def _turn(self, spent: Spent) -> None:
        """Begin a new day or month when one has begun."""
        now = self._today()
        if spent.day <= now < spent.day + 86_400:
            return
        today = datetime.datetime.fromtimestamp(now, datetime.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        day, month = today.timestamp(), today.replace(day=1).timestamp()
        # A clock that is set back must not give a budget anew.
        if day > spent.day:
            spent.day, spent.day_requests, spent.day_tokens = day, 0, 0
        if month > spent.month:
            spent.month, spent.month_requests, spent.month_tokens = month, 0, 0

    def _check_budgets(self, account: Account, policy: Policy, tokens: int) -> None:
        spent, wanted = account.spent, account.reserved + tokens
        for limit, used, more, what, ends in (
            (policy.requests_per_day, spent.day_requests, 1, "requests of a day", spent.day + 86_400),
            (policy.requests_per_month, spent.month_requests, 1, "requests of a month", _month_end(spent.month)),
            (policy.tokens_per_day, spent.day_tokens, wanted, "tokens of a day", spent.day + 86_400),
            (policy.tokens_per_month, spent.month_tokens, wanted, "tokens of a month", _month_end(spent.month)),
        ):
            if limit and used + more > limit:
                raise QuotaExhausted(
                    f"You exceeded your current quota: {used} of {limit} {what} are used, this request needs {more}",
                    limit=what.replace(" of a ", "_per_"),
                    retry_after_s=max(1.0, ends - self._today()),
                    hint="a new day or month (UTC), or rbee key set, on the queen's machine",
                )


def _check_concurrency(account: Account, policy: Policy) -> None:
    if policy.concurrency and account.in_flight >= policy.concurrency:
        raise RateLimited(
            f"This key has {account.in_flight} jobs at once, which is its limit",
            limit="concurrency",
            retry_after_s=1,
            hint="one after another",
        )


def _check_rates(account: Account, policy: Policy, tokens: int, now: float) -> None:
    for what, limit, bucket, wanted in (
        ("requests", policy.requests_per_minute, account.requests, 1),
        ("tokens", policy.tokens_per_minute, account.tokens, tokens),
    ):
        if not limit:
            continue
        # What is larger than a whole minute's worth goes when the bucket is full, and is paid off after it.
        short = min(wanted, limit) - bucket.fill(limit, now)
        if short > 0:
            wait_s = short * MINUTE_S / limit
            raise RateLimited(
                f"Rate limit reached for {what} a minute: limit {limit}, requested {wanted}. "
                f"Please try again in {duration(wait_s)}",
                limit=f"{what}_per_minute",
                retry_after_s=math.ceil(wait_s),
            )


def duration(seconds: float) -> str:
    """Return a time as OpenAI writes it: 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"


def _month_end(month: float) -> float:
    first = datetime.datetime.fromtimestamp(month, datetime.UTC)
    return month + calendar.monthrange(first.year, first.month)[1] * 86_400


def _read(path: Path) -> dict[str, Spent]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Spent])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as problem:
        log.warning("%s cannot be read (%s): budgets begin anew", path, problem)
        return {}
