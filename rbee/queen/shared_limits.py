"""The limits of `limits.py`, counted by all processes and queens together: the same checks, the same errors.

While the shared state is reached, `shared.lua` checks and charges in one step, and what it answers is kept as the last
that is known. While it is not, this process counts by itself from there, and what it counted is merged afterwards.

Every operation has a number, and a number counts once: what got no answer is sent again. A job that runs is held under
its process' name; when the process dies, another gives back what it held.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gevent
from gevent.event import Event
from msgspec import Struct, structs

from rbee import paths
from rbee.errors import RateLimited
from rbee.queen.limits import Account, Bucket, Charge, Limits, Spent
from rbee.queen.link import AT_ONCE, Command, Exchange, Link, Reply, StateLost
from rbee.queen.policy import Policy

log = logging.getLogger("rbee.queen.limits")

Operation = tuple[str | float, ...]
HELD, COUNTED = 1, 1


@dataclass(slots=True)
class SharedCharge(Charge):
    """A charge that others count too, once it is `shared`; `unsure` when nothing told whether it is."""

    identity: str = ""
    job: int = 0
    shared: bool = True
    unsure: bool = False


class Own(Struct):
    """What one identity used while this process counted by itself."""

    policy: Policy
    requests: int = 0
    tokens: int = 0


class SharedLimits(Limits):
    """The accounts that this process has in common with others."""

    def __init__(self, path: Path, **clocks: Callable[[], float]) -> None:
        super().__init__(path, **clocks)
        self.link: Link
        self._numbers = itertools.count(1)
        self._live: dict[int, SharedCharge] = {}
        self._own: dict[str, Own] = {}
        self._unsure: dict[int, Operation] = {}
        """What is to be sent, or sent again, by its number; in the order of the numbers."""
        self._known: dict[str, Spent] = dict(self._remembered)
        self._epoch_path = path.with_suffix(".epoch")
        self._epoch = _read(self._epoch_path)

    def enter(self, identity: str, policy: Policy, tokens: int) -> Charge | None:
        if not policy.limited:
            return None
        job, unsure = next(self._numbers), False
        if self.link.up:
            try:
                return self._enter_shared(identity, policy, tokens, job)
            except StateLost:
                unsure = True
        try:
            charge = super().enter(identity, policy, tokens)
        except BaseException:
            if unsure:
                self._release(identity, policy, job)
            raise
        assert charge is not None
        return self._hold(SharedCharge(charge.account, policy, tokens, False, identity, job, False, unsure))

    def settle(self, charge: Charge | None, used_tokens: int) -> None:
        if not isinstance(charge, SharedCharge) or charge.settled:
            return
        self._live.pop(charge.job, None)
        if not charge.shared and not charge.unsure:
            own = self._own.setdefault(charge.identity, Own(charge.policy))
            own.requests += 1
            own.tokens += used_tokens
            super().settle(charge, used_tokens)
            return
        if charge.unsure:
            self._later(self._entered(charge, counted=True))
        operation = ("settle", charge.job, used_tokens, *self._subject(charge.identity, charge.policy))
        if not self.link.up:
            self._later(operation)
            super().settle(charge, used_tokens)
            return
        charge.settled = True
        self._settle_shared(charge, used_tokens, operation)

    def forget(self) -> None:
        """Go on alone: what others hold cannot be known any more."""
        self._known = {name: structs.replace(account.spent) for name, account in self._accounts.items()}
        for account in self._accounts.values():
            account.in_flight = account.reserved = 0
        for charge in self._live.values():
            charge.account.in_flight += 1
            charge.account.reserved += charge.tokens

    def catch_up(self, exchange: Exchange) -> None:
        """Bring what was counted alone to the others; a state that has lost everything is reminded of it."""
        if self.link.epoch != self._epoch:
            known = {**self._remembered, **self._known}
            told = [self.link.command("remind", name, *structs.astuple(spent)) for name, spent in known.items()]
            for start in range(0, len(told), AT_ONCE):
                exchange(told[start : start + AT_ONCE])
            gevent.get_hub().threadpool.apply(_write, (self._epoch_path, self.link.epoch))
        self.gather()
        # Others may have taken this process for dead while it could not reach the state.
        self.hold_again()
        # No switch between the last look here and the moment when the link is up: what comes then is sent at once.
        while self._unsure:
            some = list(self._unsure.items())[:AT_ONCE]
            exchange([self._numbered(number, operation) for number, operation in some])
            for number, _ in some:
                self._unsure.pop(number, None)
        self._epoch = self.link.epoch

    def hold_again(self) -> None:
        """Have every running job held that others may have given back, because this process seemed dead."""
        for charge in list(self._live.values()):
            self._later(self._entered(charge, counted=False))

    def gather(self) -> None:
        """Make operations of what was counted alone, also in the moment before the link came up."""
        for charge in list(self._live.values()):
            if not charge.shared:
                self._later(self._entered(charge, counted=True))
                charge.shared, charge.unsure = True, False
        own, self._own = self._own, {}
        for identity, used in own.items():
            self._later(("merge", used.requests, used.tokens, *self._subject(identity, used.policy)))

    def _enter_shared(self, identity: str, policy: Policy, tokens: int, job: int) -> SharedCharge:
        subject = self._subject(identity, policy)
        try:
            reply = self.link.call(self.link.command("enter", job, 0, COUNTED, job, tokens, *subject))
        except StateLost:
            raise
        except BaseException:
            self._release(identity, policy, job)
            raise
        account = self._account(identity, policy)
        self._take(account, reply)
        if reply.startswith(b"0"):
            self.check(account, policy, tokens)
            raise RateLimited("This key is over one of its limits", limit="concurrency", retry_after_s=1)
        return self._hold(SharedCharge(account, policy, tokens, False, identity, job))

    def _settle_shared(self, charge: SharedCharge, used: int, operation: Operation) -> None:
        over = Event()

        def done(reply: Reply) -> None:
            if isinstance(reply, StateLost):
                # `forget` has counted the jobs that run, and this one was not among them any more.
                charge.account.tokens.left += charge.tokens - used
                charge.account.spent.day_tokens += used
                charge.account.spent.month_tokens += used
            else:
                self._take(charge.account, reply)
            over.set()

        self._later(operation, done)
        if charge.policy.concurrency and gevent.getcurrent() is not gevent.get_hub():
            # Whoever has the end of an answer may send the next request at once, to another process.
            over.wait()

    def _hold(self, charge: SharedCharge) -> SharedCharge:
        self._live[charge.job] = charge
        return charge

    def _release(self, identity: str, policy: Policy, job: int) -> None:
        """Give back what a job may have been charged that is not run."""
        self._later(("settle", job, 0, *self._subject(identity, policy)))

    def _later(self, operation: Operation, done: Callable[[Reply], None] = lambda reply: None) -> None:
        """Send an operation at once where that is possible, and else with what is caught up."""
        number = next(self._numbers)
        self._unsure[number] = operation

        def answered(reply: Reply) -> None:
            if not isinstance(reply, StateLost):
                self._unsure.pop(number, None)
            done(reply)

        if self.link.up:
            self.link.send(self._numbered(number, operation), answered)

    def _numbered(self, number: int, operation: Operation) -> Command:
        kind, *rest = operation
        return self.link.command(str(kind), number, *rest)

    def _entered(self, charge: SharedCharge, *, counted: bool) -> Operation:
        return ("enter", HELD, int(counted), charge.job, charge.tokens, *self._subject(charge.identity, charge.policy))

    def _subject(self, identity: str, policy: Policy) -> Operation:
        spent = self._account(identity, policy).spent
        return (
            identity, spent.day, spent.month, policy.requests_per_minute, policy.tokens_per_minute, policy.concurrency,
            policy.requests_per_day, policy.tokens_per_day, policy.requests_per_month, policy.tokens_per_month,
        )  # fmt: skip

    def _take(self, account: Account, reply: Reply) -> None:
        """Keep what the shared state answered as the last that is known."""
        _, in_flight, reserved, requests, tokens, day, month, *counts = map(float, reply.split())
        account.in_flight, account.reserved = int(in_flight), int(reserved)
        now = self._clock()
        if requests == requests:
            account.requests = Bucket(requests, now)
        if tokens == tokens:
            account.tokens = Bucket(tokens, now)
        account.spent = Spent(day, month, *map(int, counts))
        self._changed = True


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _write(path: Path, epoch: str) -> None:
    try:
        paths.write_private(path, epoch.encode())
    except OSError as problem:
        log.warning("cannot save which state was reminded: %s", problem)
