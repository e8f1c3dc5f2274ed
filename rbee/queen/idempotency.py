"""`Idempotency-Key`: the same request, sent again, has one execution and one answer.

Source: draft-ietf-httpapi-idempotency-key-header. A key belongs to its owner and to one request; with another request
it is refused with 409. Answers are kept for 24 hours. What failed is not kept: sending it again tries it again.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from sqlite3 import Connection

import gevent
from gevent.event import Event
from msgspec import Struct, structs

from rbee.errors import Busy, InvalidRequest, KeyReused, RbeeError
from rbee.queen.client_watch import ClientGone, ClientWatch
from rbee.queen.job import Job, Reply
from rbee.queen.records import IDEMPOTENCY_S, Records

MAX_ANSWER_BYTES = 4 * 1024 * 1024
WAIT_S = 900.0
KEY = re.compile(r"[\x21-\x7e][\x20-\x7e]{0,254}")
LARGE_BYTES = 65536


class Kept(Struct, frozen=True):
    """An answer that is given again."""

    digest: bytes
    job: str
    status: int
    content_type: str
    body: bytes


class Leader:
    """The request that came first under a key; the others wait for `over`. `kept` or `problem` is what they get."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.over = Event()
        self.kept: Kept | None = None
        self.problem: RbeeError | None = None


class Idempotency:
    """Who leads at present under which key, and the answers of the last day."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._leaders: dict[tuple[str, str], Leader] = {}

    def reply(self, owner: str, key: str, job: Job, run: Callable[[Job], Reply]) -> Reply:
        """Return the reply to `job`: from `run`, or what the first request under this key got; `job.id` follows it.

        Raises: KeyReused, InvalidRequest, ClientGone, Busy when the first one takes too long, and what `run` raises.
        """
        digest = fingerprint(key, job.path, job.body)
        while True:
            kept = self._records.call(lambda db: find(db, owner, key, digest))
            if kept is not None:
                return _again(job, kept)
            # Between the look-up and here others may have run; only one of them leads.
            leader = self._leaders.get((owner, key))
            if leader is None:
                return self._lead(owner, key, digest, job, run)
            if leader.digest != digest:
                raise _reused(key)
            followed = _follow(leader, job.client)
            if followed is not None:
                return _again(job, followed)

    def accept(self, owner: str, key: str, path: str, body: bytes, create: Callable[..., Kept]) -> Kept:
        """Return what `create(operation)` made; the operation it is given keeps that in the same transaction."""
        digest = fingerprint(key, path, body)
        kept = self._records.call(lambda db: find(db, owner, key, digest))
        if kept is not None:
            return kept
        try:
            return create(lambda made: lambda db: _keep_new(db, owner, key, digest, made))
        except _Known as known:
            return known.kept

    def _lead(self, owner: str, key: str, digest: bytes, job: Job, run: Callable[[Job], Reply]) -> Reply:
        leader = self._leaders[owner, key] = Leader(digest)

        def end(kept: Kept | None, problem: RbeeError | None = None) -> None:
            leader.kept, leader.problem = kept, problem
            self._leaders.pop((owner, key), None)
            leader.over.set()

        try:
            reply = run(job)
            if isinstance(reply.body, bytes):
                kept = Kept(digest, job.id, reply.status, reply.content_type, reply.body)
                self._keep(owner, key, kept)
                end(kept)
                return reply
        except RbeeError as problem:
            end(None, problem)
            raise
        except BaseException:
            end(None)
            raise
        return Reply(reply.status, reply.content_type, _Collected(self, owner, key, digest, job, reply, end))

    def keep_stream(self, owner: str, key: str, kept: Kept) -> None:
        """Keep the answer of a stream that went well to its end."""
        self._keep(owner, key, kept)

    def _keep(self, owner: str, key: str, kept: Kept) -> None:
        if len(kept.body) <= MAX_ANSWER_BYTES:
            self._records.call(lambda db: _insert(db, owner, key, kept))


class _Collected:
    """A stream that is kept as it passes."""

    def __init__(
        self, store: Idempotency, owner: str, key: str, digest: bytes, job: Job, reply: Reply,
        end: Callable[[Kept | None], None],
    ) -> None:  # fmt: skip
        assert not isinstance(reply.body, bytes)
        self._body = reply.body
        self._parts: list[bytes] | None = []
        self._size = 0
        self._chunks = iter(reply.body)
        self._end: Callable[[Kept | None], None] | None = end
        self._kept = Kept(digest, job.id, reply.status, reply.content_type, b"")
        self._store, self._owner, self._key, self._job = store, owner, key, job

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            chunk = next(self._chunks)
        except StopIteration:
            self._over()
            raise
        self._size += len(chunk)
        if self._size > MAX_ANSWER_BYTES:
            self._parts = None
        if self._parts is not None:
            self._parts.append(chunk)
        return chunk

    def _over(self) -> None:
        end, self._end = self._end, None
        if end is None:
            return
        whole = self._job.answered and self._parts is not None
        kept = structs.replace(self._kept, body=b"".join(self._parts or [])) if whole else None
        try:
            if kept is not None:
                self._store.keep_stream(self._owner, self._key, kept)
        finally:
            end(kept)

    def close(self) -> None:
        """End the stream; one that was not read to its end is not kept."""
        closing = getattr(self._body, "close", None)
        if closing is not None:
            closing()
        end, self._end = self._end, None
        if end is not None:
            end(None)


class _Known(Exception):
    """Another request under this key was faster."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept


def fingerprint(key: str, path: str, body: bytes) -> bytes:
    """Return what tells one request from another. Raises: InvalidRequest when the key is none."""
    if not KEY.fullmatch(key):
        raise InvalidRequest("An Idempotency-Key is 1 to 255 visible characters of ASCII", param="Idempotency-Key")
    text = path.encode() + b"\0" + body
    if len(text) > LARGE_BYTES:
        digest: bytes = gevent.get_hub().threadpool.apply(lambda: hashlib.sha256(text).digest())
        return digest
    return hashlib.sha256(text).digest()


def find(db: Connection, owner: str, key: str, digest: bytes) -> Kept | None:
    """Return the answer that is kept under a key. Raises: KeyReused."""
    row = db.execute(
        "SELECT digest, job, status, content_type, body FROM answers WHERE owner = ? AND key = ? AND made_at > ?",
        (owner, key, time.time() - IDEMPOTENCY_S),
    ).fetchone()
    if row is not None and row[0] != digest:
        raise _reused(key)
    return Kept(*row) if row is not None else None


def _keep_new(db: Connection, owner: str, key: str, digest: bytes, made: Kept) -> None:
    found = find(db, owner, key, digest)
    if found is not None:
        raise _Known(found)
    _insert(db, owner, key, Kept(digest, made.job, made.status, made.content_type, made.body))


def _insert(db: Connection, owner: str, key: str, kept: Kept) -> None:
    db.execute(
        "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (owner, key, kept.digest, kept.job, kept.status, kept.content_type, kept.body, time.time()),
    )


def _follow(leader: Leader, client: ClientWatch) -> Kept | None:
    """Wait for the first request's end. None: it came to nothing, and somebody else has to lead."""
    if not gevent.wait([leader.over, client.gone], timeout=WAIT_S, count=1):
        raise Busy("The first request with this Idempotency-Key is not answered yet", retry_after_s=30)
    if client.gone.is_set():
        raise ClientGone
    if leader.problem is not None:
        raise leader.problem
    return leader.kept


def _again(job: Job, kept: Kept) -> Reply:
    job.client.close()
    job.id = kept.job
    return Reply(kept.status, kept.content_type, kept.body)


def _reused(key: str) -> KeyReused:
    return KeyReused(
        f"The Idempotency-Key {key[:80]!r} was used for another request", hint="a new key", param="Idempotency-Key"
    )
