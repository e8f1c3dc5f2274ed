"""Watch the hives of the inventory: one long poll each, for as long as the inventory names it.

`GET /v1/hive/watch?after=EPOCH:SEQUENCE&wait=2.5` answers when the hive's state is newer than that, at the latest
after 2.5 s with the state as it is. So a change is known at once. A hive that is silent or refuses is asked again and
again, and counts as unreachable 6.5 s after its last answer, when its workers leave routing (`watched`): a link that
flaps or loses packets, and a hive that restarts, are no change of state.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import gevent
from gevent import Greenlet
from gevent.event import AsyncResult
from gevent.lock import BoundedSemaphore

from rbee.client import Client
from rbee.errors import Lost, RbeeError, TimedOut
from rbee.inventory.fleet import Host
from rbee.queen.fleet import Fleet
from rbee.queen.health import answers, give_up
from rbee.queen.inventory import Identity
from rbee.queen.watched import ROUTED_FOR_S, AnotherHive, HiveState, Watched, https_url
from rbee.tokens import derived_token
from rbee.wire.fleet import HiveReport

log = logging.getLogger("rbee.queen.watching")

WAIT_S = 2.5
POLL_BOUND_S = 5.5
DOUBT_PAUSE_S = 0.2
LATE_S, AGAIN_S = 3.0, 0.7
"""When an answer is late (that to a long poll takes `WAIT_S`), and how often it is asked for again."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
GAP_S = 0.05
"""Between two polls, so that a hive that changes without end is not asked without end."""
CONNECTING_AT_ONCE = 32
"""Fewer than the event loop's threads, which look names up: dead ones must not hold up those of healthy hosts."""


@dataclass
class Watch:
    """A running watch, and what it was started for."""

    subject: tuple[object, ...]
    watched: Watched
    greenlet: Greenlet[..., NoReturn] | None


class Watching:
    """Keeps one watch for each host of the inventory."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._watches: dict[str, Watch] = {}
        self._connecting = BoundedSemaphore(CONNECTING_AT_ONCE)

    def follow(self, hosts: Mapping[str, Host], identity: Identity) -> None:
        """Watch exactly these hosts. One whose address or identity is another is met anew, the others stay."""
        for name in self._watches.keys() - hosts.keys():
            self._end(name)
            log.info("the inventory has no host %s any more", name)
        for name, host in hosts.items():
            subject = (host.hostname, host.hive_port, identity)
            watch = self._watches.get(name)
            if watch is not None and watch.subject == subject:
                watch.watched.host = host
                continue
            if watch is not None:
                self._end(name)
            self._watches[name] = self._begin(host, identity, subject)

    def _begin(self, host: Host, identity: Identity, subject: tuple[object, ...]) -> Watch:
        watched = Watched(host, https_url(host.hostname, host.hive_port))
        self._fleet.watch(watched)
        if identity.problem:
            self._fleet.miss(watched, identity.problem)
            return Watch(subject, watched, None)
        token = derived_token(identity.key, "hive", host.name)
        watched.tls = identity.tls
        watched.client = Client(watched.url, token=token, tls=identity.tls)
        return Watch(subject, watched, gevent.spawn(self._run, watched, watched.client))

    def _end(self, name: str) -> None:
        watch = self._watches.pop(name)
        if watch.greenlet is not None:
            watch.greenlet.kill(block=False)
        if watch.watched.client is not None:
            watch.watched.client.close()
        self._fleet.unwatch(name)

    def _run(self, watched: Watched, client: Client) -> NoReturn:
        pause_s = FIRST_PAUSE_S
        while True:
            silent = False
            try:
                self._poll(watched, client)
                pause_s = FIRST_PAUSE_S
                gevent.sleep(GAP_S)
                continue
            except RbeeError as problem:
                reason = str(problem)
                silent = isinstance(problem, Lost) and not isinstance(problem, AnotherHive)
                if isinstance(problem, TimedOut):
                    gevent.spawn(self._look_after_jobs, watched.host.name)
            except Exception as problem:
                log.exception("the hive %s", watched.host.name)
                reason = f"Its answer is not understood ({problem})"
            if silent and watched.in_doubt:
                # Its workers stay in routing anyway: a link that flaps, or a hive that restarts, is no change of state.
                gevent.sleep(DOUBT_PAUSE_S)
                continue
            if watched.state is not HiveState.UNREACHABLE:
                log.warning("the hive %s is unreachable: %s", watched.host.name, reason)
            self._fleet.miss(watched, reason)
            gevent.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _look_after_jobs(self, name: str) -> None:
        """Have the jobs that wait at the workers of a silent host sent elsewhere, unless those answer by themselves."""
        hive = self._fleet.hives.get(name)
        for worker in list(hive.workers.values()) if hive is not None else ():
            if worker.unanswered and not answers(worker):
                give_up(worker)

    def _poll(self, watched: Watched, client: Client) -> None:
        """Get in touch with a hive, or wait for its news. Raises: RbeeError."""
        if watched.state is not HiveState.READY:
            with self._connecting:
                answer = _ask(watched, client, "/v1/hive")
            log.info("the hive %s is reached at %s", watched.host.name, watched.url)
        else:
            known = self._fleet.hives[watched.host.name].report
            path = f"/v1/hive/watch?after={known.epoch!r}:{known.sequence}&wait={WAIT_S:g}"
            answer = _ask_often(watched, client, path)
        self._fleet.hear(watched, answer)


def _ask(watched: Watched, client: Client, path: str) -> HiveReport:
    """Return what a hive says. Raises: RbeeError."""
    late = TimedOut(f"{watched.url} did not answer within {POLL_BOUND_S:g} s")
    with gevent.Timeout(POLL_BOUND_S, late):
        return client.get(path, HiveReport, timeout_s=POLL_BOUND_S)


def _ask_often(watched: Watched, client: Client, path: str) -> HiveReport:
    """Return what a hive says that answered of late; when it is silent, ask it again and again. Raises: RbeeError.

    On a network that loses packets, one connection may stand for seconds while another one gets through.
    """
    result: AsyncResult[HiveReport] = AsyncResult()
    until, pause_s = time.monotonic() + ROUTED_FOR_S - watched.silent_s, LATE_S
    asks = [gevent.spawn(_answer, client, path, result.set, result.set_exception)]
    try:
        while (left_s := until - time.monotonic()) > 0:
            try:
                return result.get(timeout=min(pause_s, left_s))  # type: ignore[return-value]  # it is set, or raises
            except gevent.Timeout:
                asks.append(gevent.spawn(_answer, client, "/v1/hive", result.set, lambda problem: None))
                pause_s = AGAIN_S
        raise TimedOut(f"{watched.url} did not answer within {ROUTED_FOR_S:g} s")
    finally:
        gevent.killall(asks, block=False)


def _answer(
    client: Client, path: str, told: Callable[[HiveReport], None], failed: Callable[[BaseException], None]
) -> None:
    try:
        told(client.get(path, HiveReport, timeout_s=ROUTED_FOR_S))
    except Exception as problem:  # noqa: BLE001  # it is raised again where the answer is waited for
        failed(problem)
