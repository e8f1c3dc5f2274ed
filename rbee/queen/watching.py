"""Watch the hives of the inventory: one long poll each, for as long as the inventory names it.

`GET /v1/hive/watch?after=EPOCH:SEQUENCE&wait=2.5` answers when the hive's state is newer than that, at the latest
after 2.5 s with the state as it is. So a change is known at once, the end of a hive by its connection, and a host that
has fallen silent after at most 5.5 s; its workers leave routing 6.5 s after the hive's last answer (`watched`).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import gevent
from gevent import Greenlet
from gevent.lock import BoundedSemaphore

from rbee.client import Client
from rbee.errors import RbeeError, TimedOut
from rbee.inventory.fleet import Host
from rbee.queen.fleet import Fleet
from rbee.queen.inventory import Identity
from rbee.queen.watched import HiveState, Watched, https_url
from rbee.tokens import derived_token
from rbee.wire.fleet import HiveReport

log = logging.getLogger("rbee.queen.watching")

WAIT_S = 2.5
POLL_BOUND_S = 5.5
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
            try:
                self._poll(watched, client)
                pause_s = FIRST_PAUSE_S
                gevent.sleep(GAP_S)
                continue
            except RbeeError as problem:
                reason = str(problem)
            except Exception as problem:
                log.exception("the hive %s", watched.host.name)
                reason = f"Its answer is not understood ({problem})"
            if watched.state is not HiveState.UNREACHABLE:
                log.warning("the hive %s is unreachable: %s", watched.host.name, reason)
            self._fleet.miss(watched, reason)
            gevent.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _poll(self, watched: Watched, client: Client) -> None:
        """Get in touch with a hive, or wait for its news. Raises: RbeeError."""
        if watched.state is not HiveState.READY:
            with self._connecting:
                answer = _ask(watched, client, "/v1/hive")
            log.info("the hive %s is reached at %s", watched.host.name, watched.url)
        else:
            known = self._fleet.hives[watched.host.name].report
            path = f"/v1/hive/watch?after={known.epoch!r}:{known.sequence}&wait={WAIT_S:g}"
            answer = _ask(watched, client, path)
        self._fleet.hear(watched, answer)


def _ask(watched: Watched, client: Client, path: str) -> HiveReport:
    late = TimedOut(f"{watched.url} did not answer within {POLL_BOUND_S:g} s")
    with gevent.Timeout(POLL_BOUND_S, late):
        return client.get(path, HiveReport, timeout_s=POLL_BOUND_S)
