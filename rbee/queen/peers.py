"""The other server processes of this queen, the other queens, and how one answers for another.

Processes of one queen talk over Unix sockets, queens at the addresses that they advertise. A request that one passes on
carries a token that shows where it comes from, the caller that the first one has let in, and how far it may still go:
`process` no further, `queen` to another process of that queen. So no request goes round in circles.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import gevent
import msgspec

from rbee.errors import AccessDenied, Busy, RbeeError
from rbee.http.upstream import Answer, Upstream
from rbee.queen.access import Access, Caller
from rbee.queen.ledger import caller_of, caller_text
from rbee.queen.owners import Owner
from rbee.queen.settings import Settings
from rbee.queen.slots import socket_path

TOKEN, CALLER, REACH = "X-Rbee-Peer", "X-Rbee-Peer-Caller", "X-Rbee-Peer-Reach"
TOKEN_OF, CALLER_OF, REACH_OF = (f"HTTP_{name.upper().replace('-', '_')}" for name in (TOKEN, CALLER, REACH))
PROCESS, QUEEN = "process", "queen"

ASK_TIMEOUT_S = 3.0
MAX_ANSWER_BYTES = 32 * 1024 * 1024
AWAY_AFTER_S = 5.0
MISSED_FOR_S = 3600.0
"""How long a list is said to lack what a queen has who is away."""
TELL_AGAIN = (0.0, 0.5, 2.0)
"""The pauses before what another process must know is sent: the second and third where the one before failed."""


@dataclass
class Neighbour:
    """Another queen: where she says that she is, and when one of her processes was last heard of (monotonic)."""

    url: str
    upstream: Upstream | None
    heard_at: float

    @property
    def away(self) -> bool:
        """Return True when she has said nothing for a while."""
        return time.monotonic() - self.heard_at > AWAY_AFTER_S


class Route(NamedTuple):
    """The way to an owner: the connections, the token, and how far the request may go on from there."""

    upstream: Upstream
    token: str
    reach: str
    name: str


class Gathered(NamedTuple):
    """What several answered, by name, and who did not in time."""

    answers: dict[str, bytes]
    missing: list[str]


class Peers:
    """Who else there is. `shared_token` is the one that the queens of one state have in common, once it is known."""

    def __init__(self, own: Owner, settings: Settings) -> None:
        self.own = own
        self.processes = settings.processes
        self.queens: dict[str, Neighbour] = {}
        self.shared_token = ""
        self._token = settings.admin_token
        self._hive_token = settings.hive_token
        self._siblings = {
            slot: Upstream(f"unix:{socket_path(settings.state_dir, slot)}")
            for slot in range(settings.processes)
            if slot != own.slot
        }

    def meet(self, queen: str, url: str) -> None:
        """Note that another queen lives, and where."""
        known = self.queens.get(queen)
        if known is None or known.url != url:
            self.queens[queen] = Neighbour(url, Upstream(url) if url else None, time.monotonic())
        else:
            known.heard_at = time.monotonic()

    def trusts(self, token: str) -> bool:
        """Return True for the token of another process of this queen, or of another queen."""
        given = token.encode("utf-8", "replace")
        known = [one.encode() for one in (self._token, self.shared_token) if one]
        return any(hmac.compare_digest(given, one) for one in known)

    def route(self, owner: Owner) -> Route:
        """Return the way to another process. Raises: Busy when its queen cannot be reached from here."""
        if owner.queen == self.own.queen:
            # What a process left that is no more, because there are fewer now, the first one has taken over.
            slot = owner.slot if owner.slot < self.processes else 0
            return Route(self._siblings[slot], self._token, PROCESS, f"process {slot}")
        queen = self.queens.get(owner.queen)
        if queen is None or queen.upstream is None or not self.shared_token:
            told = "says at no address" if queen is not None and not queen.url else "is not known here at present"
            raise away(f"the queen {owner.queen}, who {told}")
        return Route(queen.upstream, self.shared_token, QUEEN, f"the queen {owner.queen}")

    def has(self, owner: Owner) -> bool:
        """Return True when this very process is the owner."""
        return owner.queen == self.own.queen and self.slot_of(owner) == self.own.slot

    def slot_of(self, owner: Owner) -> int:
        """Return who has what was in a slot of this queen."""
        return owner.slot if owner.slot < self.processes else 0

    def siblings(self) -> list[Route]:
        """Return the ways to the other processes of this queen."""
        return [Route(up, self._token, PROCESS, f"process {slot}") for slot, up in sorted(self._siblings.items())]

    def neighbours(self) -> list[Route]:
        """Return the ways to the other queens that live."""
        found = sorted((name, queen.upstream) for name, queen in self.queens.items() if not queen.away)
        if not self.shared_token:
            return []
        return [Route(up, self.shared_token, QUEEN, f"the queen {name}") for name, up in found if up is not None]

    def silent(self) -> list[str]:
        """Return the names of the other queens that lived a while ago, and do not now."""
        since = time.monotonic() - MISSED_FOR_S
        return [f"the queen {name}" for name, one in sorted(self.queens.items()) if one.away and one.heard_at > since]

    def gather(self, routes: Iterable[Route], path: str, caller: Caller) -> Gathered:
        """Ask several at once."""
        asked = {route.name: gevent.spawn(self._get, route, path, caller) for route in routes}
        gevent.joinall(list(asked.values()), timeout=ASK_TIMEOUT_S)
        answers = {name: one.value for name, one in asked.items() if one.value is not None}
        gevent.killall(list(asked.values()), block=False)
        return Gathered(answers, sorted(asked.keys() - answers.keys()))

    def tell(self, path: str, body: bytes, headers: Mapping[str, str] = {}) -> None:
        """Have every other process of this queen take what a hive of this machine told; nobody waits for that."""
        for route in self.siblings():
            gevent.spawn(self._tell, route, path, body, headers)

    def _get(self, route: Route, path: str, caller: Caller) -> bytes | None:
        try:
            answer = send(route, "GET", path, caller=caller, timeout_s=ASK_TIMEOUT_S)
            data = answer.read(MAX_ANSWER_BYTES, ASK_TIMEOUT_S)
        except (RbeeError, ValueError):
            return None
        return data if answer.status == 200 else None

    def _tell(self, route: Route, path: str, body: bytes, more: Mapping[str, str]) -> None:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._hive_token}", **more}
        for pause_s in TELL_AGAIN:
            gevent.sleep(pause_s)
            try:
                answer = send(route, "POST", path, body, headers=headers, timeout_s=ASK_TIMEOUT_S)
                answer.read(MAX_ANSWER_BYTES, ASK_TIMEOUT_S)
                return
            except (RbeeError, ValueError):
                continue  # one that starts asks the hive itself


def send(
    route: Route,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    caller: Caller | None = None,
    headers: Mapping[str, str] = {},
    timeout_s: float | None = ASK_TIMEOUT_S,
    **more: object,
) -> Answer:
    """Send a request along a route. Raises: Lost."""
    own = {TOKEN: route.token, REACH: route.reach}
    if caller is not None:
        # A name may hold what no header may (RFC 9110, 5.5).
        own[CALLER] = base64.urlsafe_b64encode(caller_text(caller).encode()).decode()
    return route.upstream.request(method, path, body, headers={**headers, **own}, timeout_s=timeout_s, **more)  # type: ignore[arg-type]


def reach_of(environ: Mapping[str, str]) -> str:
    """Return how far a request may go on; empty for a client's, which is passed on to whoever has what it asks for."""
    return environ.get(REACH_OF, "") if TOKEN_OF in environ else ""


def away(who: str) -> Busy:
    """Return what a client is told whose job, file or batch is where nobody answers."""
    return Busy(f"What is asked for is at {who}: nobody answers there", retry_after_s=2)


class SharedAccess(Access):
    """Access that also takes a caller whom another process has let in; the control of the fleet is not passed on."""

    peers: Peers

    def caller(self, environ: Mapping[str, str]) -> Caller:
        return self._vouched(environ) or super().caller(environ)

    def reader(self, environ: Mapping[str, str]) -> Caller:
        return self._vouched(environ) or super().reader(environ)

    def _vouched(self, environ: Mapping[str, str]) -> Caller | None:
        token = environ.get(TOKEN_OF)
        if token is None:
            return None
        if not self.peers.trusts(token):
            raise AccessDenied("Only another process or queen of the same state may speak for its callers")
        try:
            return caller_of(base64.urlsafe_b64decode(environ.get(CALLER_OF, "")).decode())
        except (binascii.Error, UnicodeDecodeError, msgspec.DecodeError):
            raise AccessDenied(f"The header {CALLER} holds no caller") from None
