"""Requests for what another server process or queen has go there, and its answer comes back as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import falcon
import msgspec

from rbee.errors import Lost, NotFound, TimedOut, WorkerLost
from rbee.http.upstream import Answer
from rbee.queen import body
from rbee.queen.access import Caller
from rbee.queen.client_watch import ClientGone, ClientWatch
from rbee.queen.ledger import owner_of
from rbee.queen.owners import Owner, owner_of_id
from rbee.queen.peers import PROCESS, Gathered, Peers, Route, away, reach_of, send
from rbee.wire.errors import encode_error
from rbee.wire.jobs import BatchList, FileList, JobList

if TYPE_CHECKING:
    from rbee.queen.app import Queen
    from rbee.queen.shared import Shared

L = TypeVar("L", JobList, FileList, BatchList)

CONTROL_TIMEOUT_S = 20.0
SILENCE_TIMEOUT_S = 30.0
"""Whoever streams sends a comment every other second."""
WHOLE_BYTES = 1024 * 1024
PASSED = (
    "Accept", "Content-Type", "Last-Event-ID", "Idempotency-Key", "X-Request-Timeout", "X-Rbee-Priority",
    "X-Rbee-Region", "X-Rbee-Tags", "X-Rbee-Hive", "traceparent", "tracestate",
)  # fmt: skip
OF_CONNECTION = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"})
INCOMPLETE = "X-Rbee-Incomplete"
"""Who did not answer when a list was put together."""

Respond = Callable[..., None]


class Passed:
    """A resource whose requests may be for others. Which ones, its path and its options tell:

    - its path names an id: the id's owner answers;
    - `merged` is the type of its list: everybody's is asked for, and they are one;
    - `once`: a POST with an Idempotency-Key goes to whoever had that key first.
    """

    def __init__(
        self, queen: Queen, sharing: Shared, resource: Any, *, merged: type[Any] | None = None, once: bool = False
    ) -> None:
        self._queen = queen
        self._sharing = sharing
        self._peers = sharing.peers
        self._merged = merged
        self._once = once
        for name in ("on_get", "on_post", "on_delete"):
            respond = getattr(resource, name, None)
            if respond is not None:
                setattr(self, name, self._responder(respond))

    def _responder(self, respond: Respond) -> Respond:
        def answer(req: falcon.Request, resp: falcon.Response, **named: str) -> None:
            key = req.env.get("HTTP_IDEMPOTENCY_KEY") if self._once and req.method == "POST" else None
            if named:
                self._of_owner(respond, req, resp, named)
            elif key is not None and reach_of(req.env) != PROCESS:
                self._of_first(respond, req, resp, key)
            else:
                respond(req, resp)
                if self._merged is not None and req.method == "GET":
                    self._merge(req, resp, self._merged)

        return answer

    def _of_owner(self, respond: Respond, req: falcon.Request, resp: falcon.Response, named: dict[str, str]) -> None:
        own, caller = self._peers.own, self._queen.access.caller(req.env)
        [found] = named.values()
        # What was made before anything was shared is at the first process.
        owner = owner_of_id(found) or Owner(own.queen, 0)
        route = route_to(self._peers, owner, req)
        if route is None:
            try:
                respond(req, resp, **named)
                return
            except NotFound:
                # When there were fewer processes, the first one took over what lay in this slot.
                if own.slot == 0 or owner.queen != own.queen:
                    raise
                route = self._peers.route(Owner(own.queen, 0))
        pass_on(req, resp, route, caller, timeout_s=CONTROL_TIMEOUT_S)

    def _of_first(self, respond: Respond, req: falcon.Request, resp: falcon.Response, key: str) -> None:
        queen = self._queen
        caller = queen.access.caller(req.env)
        owner = self._sharing.first(hashed(owner_of(caller), key))
        route = route_to(self._peers, owner, req)
        if route is None:
            respond(req, resp)
        else:
            pass_on(req, resp, route, caller, timeout_s=queen.settings.first_byte_timeout_s)

    def _merge(self, req: falcon.Request, resp: falcon.Response, type_: type[L]) -> None:
        peers, reach = self._peers, reach_of(req.env)
        if reach == PROCESS:
            return
        routes = peers.siblings() + ([] if reach else peers.neighbours())
        path = f"{req.path}?{req.query_string}" if req.query_string else req.path
        found: Gathered = peers.gather(routes, path, self._queen.access.caller(req.env))
        pages: list[L] = [msgspec.json.decode(data, type=type_) for data in [resp.data or b"", *found.answers.values()]]
        limit = req.get_param_as_int("limit") or (20 if type_ is not FileList else 10_000)
        resp.data = msgspec.json.encode(one_page(pages, limit))
        missing = found.missing + ([] if reach else peers.silent())
        if missing:
            resp.set_header(INCOMPLETE, ", ".join(missing))


def passed(queen: Queen, resource: Any, *, merged: type[Any] | None = None, once: bool = False) -> Any:
    """Return a resource that passes on what is for others, where there are others."""
    sharing = queen.sharing
    return Passed(queen, sharing, resource, merged=merged, once=once) if sharing is not None else resource


def route_to(peers: Peers, owner: Owner, req: falcon.Request) -> Route | None:
    """Return the way to an owner; None when it is here, or the request may go no further. Raises: Busy."""
    reach = reach_of(req.env)
    if peers.has(owner) or reach == PROCESS or (reach and owner.queen != peers.own.queen):
        return None
    return peers.route(owner)


def elsewhere(queen: Queen, req: falcon.Request, found: str) -> Route | None:
    """Return the way to the owner of an id, or None when that is this process. Raises: Busy."""
    owner = owner_of_id(found)
    if queen.sharing is None or owner is None:
        return None
    return route_to(queen.sharing.peers, owner, req)


def pass_on(
    req: falcon.Request,
    resp: falcon.Response,
    route: Route,
    caller: Caller,
    *,
    timeout_s: float,
    data: bytes | None = None,
) -> None:
    """Have somebody else answer a request, whose body is `data` where it was read before. Raises: Busy, ClientGone."""
    path = quote(req.path, safe="/:@-._~!$&'()*+,;=") + (f"?{req.query_string}" if req.query_string else "")
    headers = {name: value for name in PASSED if (value := req.get_header(name)) is not None}
    sent = body.read(req) if data is None else data
    client = ClientWatch(req.env.get("gunicorn.socket"))

    def wait(answer: Answer) -> None:
        client.call_when_gone(answer.close)

    try:
        answer = send(route, req.method, path, sent, caller=caller, headers=headers, timeout_s=timeout_s, wait=wait)
        _answer(resp, answer, Body(answer, client, route, anthropic=req.path.startswith("/v1/messages")))
    except Lost:
        client.close()
        if client.gone.is_set():
            raise ClientGone from None
        raise away(route.name) from None
    except BaseException:
        client.close()
        raise


def _answer(resp: falcon.Response, answer: Answer, rest: Body) -> None:
    resp.status = answer.status
    kept = {name: value for name, value in answer.headers.items() if name not in OF_CONNECTION}
    resp.content_type = kept.pop("content-type", None)
    resp.set_headers(kept)
    length = answer.headers.get("content-length", "")
    if length.isdigit() and int(length) <= WHOLE_BYTES:
        resp.data = b"".join(rest)
    else:
        if length.isdigit():
            resp.content_length = int(length)
        resp.stream = rest


class Body:
    """The body of another's answer as it comes; `close` ends it there, too."""

    def __init__(self, answer: Answer, client: ClientWatch, route: Route, *, anthropic: bool = False) -> None:
        self._anthropic = anthropic
        self._answer = answer
        self._client = client
        self._route = route
        self._events = answer.headers.get("content-type", "").startswith("text/event-stream")
        self._over = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._over:
            self.close()
            raise StopIteration
        try:
            data = self._answer.next(SILENCE_TIMEOUT_S)
        except (WorkerLost, TimeoutError):
            return self._broken()
        if not data:
            self.close()
            raise StopIteration
        return data

    def _broken(self) -> bytes:
        """End what broke off: a stream by an event, a whole body by its connection. Raises: Lost, ClientGone."""
        gone, self._over = self._client.gone.is_set(), True
        self.close()
        if gone:
            raise StopIteration
        problem = TimedOut(f"The answer of {self._route.name} broke off")
        if not self._events:
            raise problem
        # It may have broken off in the middle of an event.
        if self._anthropic:
            return b"\n\nevent: error\ndata: " + encode_error(problem, anthropic=True) + b"\n\n"
        return b"\n\ndata: " + encode_error(problem) + b"\n\n"

    def close(self) -> None:
        """End the watch of the client, and the exchange."""
        self._client.close()
        self._answer.close()


def one_page(pages: list[L], limit: int) -> L:
    """Return the newest entries of several pages as one page."""
    found = {one.id: one for page in pages for one in page.data}
    data = sorted(found.values(), key=_age, reverse=True)
    return type(pages[0])(
        data=data[:limit],
        has_more=len(data) > limit or any(page.has_more for page in pages),
        first_id=data[0].id if data else None,
        last_id=data[:limit][-1].id if data else None,
    )


def _age(one: Any) -> tuple[int, str]:
    """Ids of jobs begin with their time; of files and batches, the time is told in seconds."""
    return (0 if one.object == "job" else one.created_at), one.id


def hashed(owner: str, key: str) -> str:
    """Return what stands for an Idempotency-Key where others may read it."""
    return hashlib.sha256(f"{owner}\0{key}".encode()).hexdigest()
