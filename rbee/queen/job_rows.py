"""What is asked of the table of jobs. Every function runs in the database's thread, inside its transaction."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterable
from sqlite3 import Connection

import msgspec
from msgspec import UNSET, Struct

from rbee.errors import NotFound
from rbee.queen.access import Caller
from rbee.queen.keys import ADMIN
from rbee.queen.ledger import Ended, owner_of
from rbee.queen.policy import Priority
from rbee.queen.records import write_usage
from rbee.wire.errors import ErrorDetail
from rbee.wire.jobs import JobList, JobStatus, JobUsage, JobView

WAITING = "status IN ('queued', 'running')"
NEWEST = "CAST(created_at AS INTEGER) DESC, id DESC"
"""The order of files and batches, which is the same whoever of several queens puts it together."""
VIEW = """id, status, kind, endpoint, model, priority, key, worker, created_at, started_at, ended_at, prompt_tokens,
    completion_tokens, estimated, metadata, error, response"""


class Wishes(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a client said of where and when a job is to run; `said` is its own word for the priority."""

    hive: str = ""
    region: str = ""
    tags: tuple[str, ...] = ()
    said: str = ""

    @property
    def text(self) -> str:
        """Return what a row keeps."""
        return msgspec.json.encode(self).decode() if self != NO_WISHES else ""


NO_WISHES = Wishes()


class NewJob(Struct, frozen=True, kw_only=True):
    """A job to be run later. `body` is empty for a line of a batch, which stays in its file.

    `deadline_at`, in seconds since the epoch, is when its client's patience ends; 0: never.
    """

    id: str
    owner: str
    key: str
    endpoint: str
    model: str
    created_at: float
    kind: str = "job"
    priority: Priority = "normal"
    metadata: dict[str, str] = {}
    body: bytes | None = None
    batch: str | None = None
    line: int = 0
    custom_id: str = ""
    at_byte: int = 0
    size_bytes: int = 0
    caller: str = ""
    wishes: Wishes = NO_WISHES
    deadline_at: float = 0.0


class TakenJob(Struct, frozen=True, kw_only=True):
    """What is needed to run a job."""

    id: str
    owner: str
    key: str
    endpoint: str
    model: str
    priority: Priority
    kind: str
    created_at: float
    metadata: dict[str, str]
    body: bytes | None
    batch: str | None
    at_byte: int
    size_bytes: int
    caller: str
    wishes: Wishes


class JobEnd(Struct, frozen=True, kw_only=True):
    """How a job ended. `error` is an ErrorDetail in JSON, or empty."""

    status: JobStatus
    row: Ended
    response: bytes | None = None
    events: bytes = b""


class WaitingJob(Struct, frozen=True):
    """A job that an earlier process accepted and did not end."""

    id: str
    priority: str
    batch: str | None
    deadline_at: float


def older(table: str) -> str:
    """Return the condition for what follows an id in the order `NEWEST`; it takes the id twice, its second, the id."""
    at = f"(SELECT CAST(created_at AS INTEGER) FROM {table} WHERE id = ?)"
    return f"(? IS NULL OR (CAST(created_at AS INTEGER), id) < (coalesce({at}, ?), ?))"


def scope_of(caller: Caller) -> str | None:
    """Return the owner whose records a caller may see; None stands for everyone's, which an operator sees."""
    return None if ADMIN in caller.scopes else owner_of(caller)


def insert(db: Connection, job: NewJob) -> None:
    """Write a new job. One that is there already, after a restart, stays as it is."""
    db.execute(
        """INSERT OR IGNORE INTO jobs (id, owner, key, kind, endpoint, model, status, priority, created_at, metadata,
        body, batch, line, custom_id, at_byte, size_bytes, caller, wishes, deadline_at)
        VALUES (?, ?, ?, ?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        (job.id, job.owner, job.key, job.kind, job.endpoint, job.model, job.priority, job.created_at,
         json.dumps(job.metadata), job.body, job.batch, job.line, job.custom_id, job.at_byte, job.size_bytes,
         job.caller, job.wishes.text, job.deadline_at),
    )  # fmt: skip


def insert_all(db: Connection, jobs: Iterable[NewJob]) -> None:
    """Write new jobs."""
    for job in jobs:
        insert(db, job)


def waiting_count(db: Connection, owner: str) -> int:
    """Return how many jobs of one owner wait or run, those of batches aside."""
    found = db.execute(f"SELECT count(*) FROM jobs WHERE {WAITING} AND owner = ? AND batch IS NULL", (owner,))
    return int(found.fetchone()[0])


def take(db: Connection, job_id: str) -> TakenJob | None:
    """Mark a queued job as running and return it; None when it was cancelled."""
    if not db.execute(
        "UPDATE jobs SET status = 'running', started_at = ? WHERE id = ? AND status = 'queued'", (time.time(), job_id)
    ).rowcount:
        return None
    row = db.execute(
        """SELECT id, owner, key, endpoint, model, priority, kind, created_at, metadata, body, batch, at_byte,
        size_bytes, coalesce((SELECT caller FROM batches WHERE batches.id = jobs.batch), caller),
        coalesce((SELECT wishes FROM batches WHERE batches.id = jobs.batch), wishes) FROM jobs WHERE id = ?""",
        (job_id,),
    ).fetchone()
    names = TakenJob.__struct_fields__
    kept = {"metadata": json.loads(row[8]), "wishes": msgspec.json.decode(row[-1] or "{}", type=Wishes)}
    return TakenJob(**{**dict(zip(names, row, strict=True)), **kept})


def mark_streaming(db: Connection, job_id: str) -> None:
    """Note that someone may have seen a part of this job's answer: it must not be run a second time."""
    db.execute("UPDATE jobs SET streaming = 1 WHERE id = ?", (job_id,))


def finish(db: Connection, end: JobEnd) -> None:
    """Write a job's last state and its usage; what was asked of it is not kept."""
    row = end.row
    db.execute(
        f"""UPDATE jobs SET status = ?, ended_at = ?, worker = ?, prompt_tokens = ?, completion_tokens = ?,
        estimated = ?, error = ?, response = ?, events = ?, body = NULL WHERE id = ? AND {WAITING}""",
        (end.status, row.ended_at, row.worker, row.prompt_tokens, row.completion_tokens, row.estimated, row.error,
         end.response, zlib.compress(end.events, 1) if end.events else None, row.id),
    )  # fmt: skip
    if row.prompt_tokens or row.completion_tokens:
        write_usage(db, row)


def end_queued(db: Connection, job_id: str, status: JobStatus, error: str, events: bytes) -> bool:
    """End a job that nothing runs yet, and tell whether it was so."""
    return bool(
        db.execute(
            """UPDATE jobs SET status = ?, ended_at = ?, error = ?, events = ?, body = NULL
            WHERE id = ? AND status = 'queued'""",
            (status, time.time(), error, zlib.compress(events, 1), job_id),
        ).rowcount
    )


def recover(db: Connection, interrupted: str) -> list[WaitingJob]:
    """Put right what an earlier process left, and return what is still to be run, the oldest first.

    A job whose answer had begun to stream is `interrupted`: a second run would tell its readers something else.
    """
    db.execute(
        """UPDATE jobs SET status = 'interrupted', ended_at = ?, error = ?, body = NULL
        WHERE status = 'running' AND streaming = 1""",
        (time.time(), interrupted),
    )
    db.execute("UPDATE jobs SET status = 'queued' WHERE status = 'running'")
    rows = db.execute("SELECT id, priority, batch, deadline_at FROM jobs WHERE status = 'queued' ORDER BY id")
    return [WaitingJob(*row) for row in rows]


def view(db: Connection, job_id: str, owner: str | None) -> JobView:
    """Return one job with its response. Raises: NotFound, also for a job of another owner."""
    row = db.execute(
        f"SELECT {VIEW} FROM jobs WHERE id = ? AND (? IS NULL OR owner = ?)", (job_id, owner, owner)
    ).fetchone()
    if row is None:
        raise NotFound(f"There is no job {job_id[:80]!r}", hint="rbee job list")
    return _view(row)


def events(db: Connection, job_id: str) -> bytes:
    """Return the events of an ended job as an event stream, empty when they are not kept (any more)."""
    row = db.execute("SELECT events FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return zlib.decompress(row[0]) if row and row[0] else b""


def page(
    db: Connection, owner: str | None, *, status: str | None, model: str | None, after: str | None, limit: int
) -> JobList:
    """Return some jobs, the newest first, without their responses. Ids begin with their time, so they order them."""
    conditions = {
        "owner = ?": owner,
        "status = ?": status,
        "model = ?": model,
        "id < ?": after,
    }
    given = {text: value for text, value in conditions.items() if value is not None}
    where = " AND ".join(given) or "1"
    names = VIEW.replace(", response", ", NULL")
    rows = db.execute(
        f"SELECT {names} FROM jobs WHERE {where} ORDER BY id DESC LIMIT ?", (*given.values(), limit + 1)
    ).fetchall()
    views = [_view(row) for row in rows[:limit]]
    return JobList(
        data=views,
        has_more=len(rows) > limit,
        first_id=views[0].id if views else None,
        last_id=views[-1].id if views else None,
    )


def _view(row: tuple[object, ...]) -> JobView:
    values = dict(zip((name.strip() for name in VIEW.split(",")), row, strict=True))
    error, response = values.pop("error"), values.pop("response")
    usage = JobUsage(
        prompt_tokens=values.pop("prompt_tokens"),  # type: ignore[arg-type]
        completion_tokens=values.pop("completion_tokens"),  # type: ignore[arg-type]
        estimated=bool(values.pop("estimated")),
    )
    plain = {**values, "metadata": json.loads(str(values["metadata"])), "usage": usage}
    return msgspec.structs.replace(
        msgspec.convert(plain, JobView),
        error=msgspec.json.decode(str(error), type=ErrorDetail) if error else None,
        response=msgspec.Raw(response) if isinstance(response, bytes) else UNSET,
    )
