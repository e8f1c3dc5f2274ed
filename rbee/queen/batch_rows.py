"""What is asked of the tables of batches. Every function runs in the database's thread, inside its transaction."""

from __future__ import annotations

import time
from collections.abc import Callable
from sqlite3 import Connection
from typing import TypeVar

import msgspec
from msgspec import Struct

from rbee.errors import NotFound, RateLimited
from rbee.queen.job_rows import NEWEST, WAITING, older
from rbee.queen.owners import made_at
from rbee.wire.errors import ErrorDetail
from rbee.wire.jobs import Batch, BatchList, JobStatus, RequestCounts

R = TypeVar("R")
Work = Callable[[Connection], R]

_decoder = msgspec.json.Decoder(Batch)


class LineEnd(Struct, frozen=True):
    """A line of a batch that is over."""

    line: int
    custom_id: str
    job: str
    status: str
    response: bytes | None
    error: str

    def text(self, end: str) -> bytes:
        """Return this line of the output or error file, as OpenAI has it; `end` is how the batch ended."""
        values: dict[str, object] = {"id": f"batch_req_{self.job}", "custom_id": self.custom_id}
        if self.status == JobStatus.COMPLETED:
            body = msgspec.Raw(b" ".join((self.response or b"null").split(b"\n")))
            values |= {"response": {"status_code": 200, "request_id": self.job, "body": body}, "error": None}
        else:
            values |= {"response": None, "error": self._error(end)}
        return msgspec.json.encode(values) + b"\n"

    def _error(self, end: str) -> dict[str, str]:
        if self.status == JobStatus.CANCELLED and end == "expired":
            return {"code": "batch_expired", "message": "This request could not be run within the completion window."}
        if self.status == JobStatus.CANCELLED:
            return {"code": "batch_cancelled", "message": "This request was cancelled with its batch."}
        detail = msgspec.json.decode(self.error, type=ErrorDetail)
        return {"code": detail.code or detail.type, "message": detail.message}


def insert(db: Connection, state: Batch, owner: str, caller: str, wishes: str, limit: int) -> None:
    """Write a new batch. Raises: RateLimited."""
    count = db.execute("SELECT count(*) FROM batches WHERE owner = ? AND open = 1", (owner,)).fetchone()[0]
    if count >= limit:
        raise RateLimited(f"{count} of your batches are under way, which is the limit", retry_after_s=60)
    db.execute(
        "INSERT INTO batches (id, owner, caller, created_at, open, state, wishes) VALUES (?, ?, ?, ?, 1, ?, ?)",
        (state.id, owner, caller, state.created_at, _text(state), wishes),
    )


def save(db: Connection, state: Batch) -> None:
    """Write the state of a batch that is under way."""
    db.execute("UPDATE batches SET state = ? WHERE id = ?", (_text(state), state.id))


def close(db: Connection, state: Batch) -> None:
    """Write the last state of a batch. Its answers are in files by then; its lines keep only what they used."""
    db.execute("UPDATE batches SET state = ?, open = 0 WHERE id = ?", (_text(state), state.id))
    db.execute("UPDATE jobs SET response = NULL WHERE batch = ?", (state.id,))


def get(db: Connection, batch_id: str, owner: str | None) -> Batch:
    """Return a batch. Raises: NotFound, also for one of another owner."""
    row = db.execute(
        "SELECT state FROM batches WHERE id = ? AND (? IS NULL OR owner = ?)", (batch_id, owner, owner)
    ).fetchone()
    if row is None:
        raise NotFound(f"There is no batch {batch_id[:80]!r}", param="batch_id")
    return _decoder.decode(row[0])


def page(db: Connection, owner: str | None, after: str | None, limit: int) -> BatchList:
    """Return some batches, the newest first."""
    rows = db.execute(
        f"""SELECT state FROM batches WHERE (? IS NULL OR owner = ?)
        AND {older("batches")} ORDER BY {NEWEST} LIMIT ?""",
        (owner, owner, after, after, made_at(after or ""), after, limit + 1),
    ).fetchall()
    found = [_decoder.decode(row[0]) for row in rows[:limit]]
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return BatchList(data=found, has_more=len(rows) > limit, first_id=first, last_id=last)


def open_ones(db: Connection) -> list[tuple[str, str, Batch]]:
    """Return the owner, key and state of every batch that is under way."""
    rows = db.execute("SELECT owner, caller ->> 'id', state FROM batches WHERE open = 1 ORDER BY rowid")
    return [(owner, key, _decoder.decode(state)) for owner, key, state in rows]


def forget_lines(db: Connection, batch_id: str) -> None:
    """Remove the lines of a batch of which none has run."""
    db.execute("DELETE FROM jobs WHERE batch = ?", (batch_id,))


def stop_lines(db: Connection, batch_id: str) -> tuple[int, list[str]]:
    """Cancel the lines that wait; return how many those were, and the jobs of the lines that run."""
    count = db.execute(
        "UPDATE jobs SET status = 'cancelled', ended_at = ? WHERE batch = ? AND status = 'queued'",
        (time.time(), batch_id),
    ).rowcount
    rows = db.execute("SELECT id FROM jobs WHERE batch = ? AND status = 'running'", (batch_id,))
    return count, [row[0] for row in rows]


def counts(db: Connection, batch_id: str) -> tuple[RequestCounts, int]:
    """Return how far a batch is, and how many of its lines are left."""
    total, completed, left = db.execute(
        f"""SELECT count(*), coalesce(sum(status = 'completed'), 0), coalesce(sum({WAITING}), 0)
        FROM jobs WHERE batch = ?""",
        (batch_id,),
    ).fetchone()
    return RequestCounts(total=total, completed=completed, failed=total - completed - left), left


def ended_lines(db: Connection, batch_id: str, after: int, limit: int) -> list[LineEnd]:
    """Return some lines of a batch in their order, from the one after `after` on."""
    rows = db.execute(
        """SELECT line, custom_id, id, status, response, error FROM jobs WHERE batch = ? AND line > ?
        ORDER BY line LIMIT ?""",
        (batch_id, after, limit),
    )
    return [LineEnd(*row) for row in rows]


def _text(state: Batch) -> str:
    return msgspec.json.encode(state).decode()
