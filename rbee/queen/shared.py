"""What this server process has in common with others: who they are, and what all of them count together."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from typing import NoReturn

import gevent

from rbee.queen.fleet import Fleet
from rbee.queen.link import Exchange, Link, Reply, StateLost
from rbee.queen.owners import NAME_CHARS, Owner, Signature, queen_name
from rbee.queen.peers import Peers
from rbee.queen.queueing import Queues
from rbee.queen.records import IDEMPOTENCY_S
from rbee.queen.settings import Settings
from rbee.queen.shared_limits import SharedLimits
from rbee.queen.shared_view import BEAT_S, LEASE_S, SharedCapacity, SharedView
from rbee.wire.fleet import Problem, SharedStateView

REACH_S = 1.0
"""How long a process that starts waits for the shared state, before it serves without."""
QUEENS = "rbee:queens"
"""Where every queen writes her address, for those who come later; who lives is told by the news."""
LOAD_LEASE_S, LOOK_EVERY_S = 30.0, 0.2


class Shared:
    """The sharing part of one server process."""

    def __init__(self, settings: Settings, fleet: Fleet) -> None:
        self.own = Owner(queen_name(settings.state_dir / "queen.name"), settings.slot)
        Signature.set(self.own)
        self.peers = Peers(self.own, settings)
        self.process = f"{self.own}-{os.getpid()}-{secrets.token_hex(4)}"
        self.link = Link(settings.state, settings.state_password, self.process, on_up=self._joined, on_down=self._alone)
        self.limits = SharedLimits(settings.limits_path)
        self.limits.link = self.link
        self.view = SharedView(self.own, self.process, self.link, settings.advertised, fleet, self.peers.meet)
        self.capacity = SharedCapacity(fleet)
        self.capacity.view = self.view
        fleet.on_ejection = self.view.tell_ejection

    def share(self, queues: Queues) -> None:
        """Have the queues count those who wait elsewhere."""
        self.view.queues = queues
        queues.elsewhere = self.view.waiting

    def start(self) -> None:
        """Reach for the state, and begin to tell and to hear."""
        self.link.start(REACH_S)
        gevent.spawn(self.view.listen)
        gevent.spawn(self.view.run)
        gevent.spawn(self._beat)

    def first(self, key: str) -> Owner:
        """Return who had an Idempotency-Key first: this process, when nobody did, or when that cannot be known."""
        name = f"rbee:once:{key}"
        try:
            if self.link.call(("SET", name, str(self.own), "NX", "EX", int(IDEMPOTENCY_S))):
                return self.own
            told = self.link.call(("GET", name)) or b""
        except StateLost:
            return self.own
        text = told.decode("ascii", "replace")
        return Owner(text[:NAME_CHARS], int(text[NAME_CHARS:])) if text[NAME_CHARS:].isdigit() else self.own

    @contextlib.contextmanager
    def starting(self, place: str) -> Iterator[bool]:
        """Keep other processes from starting the same worker meanwhile; False when another did so until now."""
        name = f"rbee:load:{place}"
        try:
            mine = bool(self.link.call(("SET", name, self.process, "NX", "PX", int(LOAD_LEASE_S * 1000))))
            deadline = time.monotonic() + LOAD_LEASE_S
            while not mine and self.link.call(("EXISTS", name)) and time.monotonic() < deadline:
                gevent.sleep(LOOK_EVERY_S)
        except StateLost:
            mine = True
        try:
            yield mine
        finally:
            if mine:
                self.link.send(("DEL", name))

    def shown(self) -> SharedStateView:
        """Return how the shared state stands."""
        queens = {name: queen.url for name, queen in sorted(self.peers.queens.items()) if not queen.away}
        return SharedStateView(
            url=self.link.place,
            reached=self.link.up,
            since=self.link.since,
            problem=self.link.problem,
            queen=self.own.queen,
            queens=queens,
        )

    def lost(self) -> Problem:
        """Return what a person should know while the shared state is away."""
        why = self.link.problem.rstrip(".")
        message = f"{why}. Until it is reached again, each server process counts limits by itself"
        return Problem(where=f"shared state {self.link.place}", message=message, since=self.link.since)

    def _joined(self, exchange: Exchange) -> None:
        link = self.link
        # A state that has lost everything gets the token again that the queens know already.
        candidate, token = secrets.token_hex(16), self.peers.shared_token or secrets.token_urlsafe(32)
        [(epoch, shared)] = exchange([link.join(candidate, token, LEASE_S, f"{self.own}-")])
        link.epoch, self.peers.shared_token = epoch.decode(), shared.decode()
        _, queens = exchange([("HSET", QUEENS, self.own.queen, self.view.url), ("HGETALL", QUEENS)])
        for name, url in zip(queens[::2], queens[1::2], strict=True):
            if name.decode() != self.own.queen:
                self.peers.meet(name.decode(), url.decode())
        self.limits.catch_up(exchange)

    def _alone(self) -> None:
        self.limits.forget()
        self.view.forget()

    def _beat(self) -> NoReturn:
        while True:
            gevent.sleep(BEAT_S)
            if self.link.up:
                self.limits.gather()
                self.link.send(self.link.command("beat", LEASE_S), self._beaten)

    def _beaten(self, reply: Reply) -> None:
        if not isinstance(reply, StateLost) and not reply[0]:
            # It was silent for so long that the others took it for dead.
            self.limits.hold_again()
