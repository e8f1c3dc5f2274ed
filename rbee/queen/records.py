"""The queen's records: one SQLite database, one connection in one thread, one fsync for all who wait at once.

SQLite before 3.51.3 can corrupt a WAL that two connections write or check-point (sqlite.org, "WAL-reset bug"), so
exactly one connection exists: a lock file keeps a second process out, and reads go through the same thread.
The event loop never touches the database; it waits for the thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gevent
import msgspec
from gevent.event import AsyncResult, Event
from gevent.threadpool import ThreadPool

from rbee import paths
from rbee.errors import RbeeError, StorageProblem
from rbee.queen.adoption import adopt
from rbee.queen.ledger import Ended, Ledger
from rbee.queen.retention import DAY_S, RETENTION, Retention

log = logging.getLogger("rbee.queen.records")

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], Any]

LINGER_S = 0.02
"""How long operations are gathered that are not urgent."""
ROWS_LINGER_S = 0.25
"""How long rows are gathered that nobody waits for: every operation brings those before it to the database."""
ANSWER_TIMEOUT_S = 15.0
RETRY_S = 0.5
LOCK_TIMEOUT_MS = 5000
OLDEST_SQLITE = (3, 38, 0)
"""The first with `->>`."""
PRUNE_EVERY_S = 600.0
PRUNE_AT_ONCE = 1000
IDEMPOTENCY_S = DAY_S
MAX_ANSWERS = 10_000

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, key TEXT NOT NULL, kind TEXT NOT NULL, endpoint TEXT NOT NULL,
    model TEXT NOT NULL, status TEXT NOT NULL, priority TEXT NOT NULL DEFAULT 'interactive',
    created_at REAL NOT NULL, started_at REAL NOT NULL DEFAULT 0, ended_at REAL NOT NULL DEFAULT 0,
    worker TEXT NOT NULL DEFAULT '', prompt_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0, metadata TEXT NOT NULL DEFAULT '{}',
    streaming INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '', body BLOB, response BLOB, events BLOB,
    batch TEXT, line INTEGER NOT NULL DEFAULT 0, custom_id TEXT NOT NULL DEFAULT '',
    at_byte INTEGER NOT NULL DEFAULT 0, size_bytes INTEGER NOT NULL DEFAULT 0, caller TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX IF NOT EXISTS jobs_of_owner ON jobs (owner, id);
CREATE INDEX IF NOT EXISTS jobs_waiting ON jobs (status) WHERE status IN ('queued', 'running');
CREATE INDEX IF NOT EXISTS jobs_of_batch ON jobs (batch, line) WHERE batch IS NOT NULL;
CREATE INDEX IF NOT EXISTS jobs_ended ON jobs (ended_at) WHERE ended_at > 0;
CREATE TABLE IF NOT EXISTS usage (
    job TEXT PRIMARY KEY, owner TEXT NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL, endpoint TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, ended_at REAL NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS usage_by_time ON usage (ended_at);
CREATE TABLE IF NOT EXISTS answers (
    owner TEXT NOT NULL, key TEXT NOT NULL, digest BLOB NOT NULL, job TEXT NOT NULL, status INTEGER NOT NULL,
    content_type TEXT NOT NULL, body BLOB NOT NULL, made_at REAL NOT NULL, PRIMARY KEY (owner, key)
) STRICT;
CREATE INDEX IF NOT EXISTS answers_by_time ON answers (made_at);
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, created_at REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, caller TEXT NOT NULL, created_at REAL NOT NULL, open INTEGER NOT NULL,
    state TEXT NOT NULL
) STRICT;
"""

ADDED = (
    ("jobs", "estimated", "INTEGER NOT NULL DEFAULT 0"),
    ("jobs", "wishes", "TEXT NOT NULL DEFAULT ''"),
    ("jobs", "deadline_at", "REAL NOT NULL DEFAULT 0"),
    ("usage", "estimated", "INTEGER NOT NULL DEFAULT 0"),
    ("batches", "wishes", "TEXT NOT NULL DEFAULT ''"),
)
"""Columns that a database made by an earlier version lacks."""

JOBS_OF_ENDED = """INSERT OR IGNORE INTO jobs (id, owner, key, kind, endpoint, model, status, created_at,
    started_at, ended_at, worker, prompt_tokens, completion_tokens, error, estimated)
    SELECT value->>0, value->>1, value->>2, 'request', value->>3, value->>4, value->>5, value->>6, value->>6,
    value->>7, value->>8, value->>9, value->>10, value->>11, value->>12 FROM json_each(?)"""
INTO_USAGE = """INSERT OR IGNORE INTO usage (job, owner, key, model, endpoint, prompt_tokens, completion_tokens,
    ended_at, estimated)"""
USAGE_OF_ENDED = f"""{INTO_USAGE} SELECT value->>0, value->>1, value->>2, value->>4, value->>3, value->>9, value->>10,
    value->>7, value->>12 FROM json_each(?) WHERE value->>9 OR value->>10"""
USAGE = f"{INTO_USAGE} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"


class Records:
    """The database of one queen, in `folder`. It opens itself in the background, as soon as no other process has it.

    What lies in the `orphans`, folders of processes that are no more, is taken over first.
    """

    def __init__(self, folder: Path, retention: Retention = RETENTION, orphans: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.retention = retention
        self._orphans = orphans
        self.problem = ""
        self._ledger: Ledger | None = None
        self._early: list[Ended] = []
        self._calls: list[tuple[Operation, AsyncResult[Any]]] = []
        self._db: sqlite3.Connection | None = None
        self._lock = -1
        self._pool = ThreadPool(1)
        self._wanted, self._called, self._urgent = Event(), Event(), Event()
        self._pruned_at = 0.0
        self._writer = gevent.spawn(self._run)

    def ended(self, row: Ended) -> None:
        """Note a request that has ended. It does not wait: the ledger keeps the row until the database has it."""
        if self._ledger is None:
            self._early.append(row)
        else:
            try:
                self._ledger.add(row)
            except OSError as problem:
                self.problem = f"{self.folder}: {problem.strerror}"
        if not self._wanted.is_set():
            self._wanted.set()

    def call(self, operation: Callable[[sqlite3.Connection], T], *, urgent: bool = True) -> T:
        """Run `operation` in the database's thread and return its value once it is on the disk.

        What is not urgent waits up to `LINGER_S` for others, so that it costs no fsync of its own.

        Raises: StorageProblem when that cannot be had; what the operation raises, with nothing of it kept.
        """
        result: AsyncResult[T] = AsyncResult()
        self._calls.append((operation, result))
        self._wanted.set()
        self._called.set()
        if urgent:
            self._urgent.set()
        try:
            result.get(timeout=ANSWER_TIMEOUT_S)
        except gevent.Timeout:
            raise StorageProblem(
                f"The queen's records did not answer within {ANSWER_TIMEOUT_S:g} s", retry_after_s=5
            ) from None
        return result.value  # type: ignore[return-value]  # get has not raised, so there is one

    def check(self) -> None:
        """Refuse new work while what becomes of it could not be recorded. Raises: StorageProblem."""
        if self.problem:
            raise StorageProblem(
                f"The queen's records cannot be written ({self.problem})",
                retry_after_s=5,
                hint="df -h on the queen's machine",
            )

    def close(self) -> None:
        """Commit what waits, and close the database."""
        self._writer.kill()
        if self._db is not None:
            self._commit_waiting()
            self._pool.apply(self._db.close)
            self._db = None
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        self._pool.kill()

    def _run(self) -> None:
        while not self._opened():
            gevent.sleep(RETRY_S)
        while True:
            self._wanted.wait(timeout=PRUNE_EVERY_S)
            if not self._calls:
                self._called.wait(timeout=ROWS_LINGER_S)
            self._urgent.wait(timeout=LINGER_S)
            self._wanted.clear()
            self._called.clear()
            self._urgent.clear()
            self._commit_waiting()
            if self.problem:
                gevent.sleep(RETRY_S)
                self._wanted.set()
            elif time.monotonic() - self._pruned_at > PRUNE_EVERY_S:
                self._pruned_at = time.monotonic()
                gevent.spawn(self._prune)

    def _opened(self) -> bool:
        """Take the lock and open the database; False when another process still has it, or the disk is full."""
        try:
            paths.private(self.folder)
            if self._lock < 0:
                self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            opened = self._pool.apply(self._open)
            if isinstance(opened, Exception):
                raise opened
            self._db = opened
            self._ledger = Ledger(self.folder)
        except BlockingIOError:
            self._fail("another process has them open")
            return False
        except (OSError, sqlite3.Error) as problem:
            self._fail(str(problem))
            return False
        for row in self._early:
            with contextlib.suppress(OSError):
                self._ledger.add(row)
        self._early.clear()
        self.problem = ""
        self._wanted.set()
        return True

    def _open(self) -> sqlite3.Connection | Exception:
        """Open the database. In its thread, of which gevent would log what is raised, at each try."""
        try:
            db = open_database(self.folder / "records.sqlite")
        except (OSError, sqlite3.Error) as problem:
            return problem
        try:
            adopt(db, self.folder, self._orphans, open_database, write_ended)
        except BaseException as problem:
            db.close()
            if isinstance(problem, OSError | sqlite3.Error):
                return problem
            raise
        return db

    def _commit_waiting(self) -> None:
        assert self._ledger is not None
        calls, self._calls = self._calls, []
        rows = self._ledger.take()
        outcomes = self._pool.apply(self._commit, (calls, rows))
        if isinstance(outcomes, Exception):
            self._fail(str(outcomes))
            self._ledger.failed(rows)
            problem = StorageProblem(f"The queen's records cannot be written ({outcomes})", retry_after_s=5)
            for _, result in calls:
                result.set_exception(problem)
            return
        if self.problem:
            log.warning("the records can be written again")
        self.problem = ""
        for (_, result), (value, failure) in zip(calls, outcomes, strict=True):
            if failure is None:
                result.set(value)
            else:
                result.set_exception(failure)

    def _fail(self, problem: str) -> None:
        if problem != self.problem:
            log.error("the records in %s cannot be used: %s", self.folder, problem)
        self.problem = problem

    def _commit(
        self, calls: list[tuple[Operation, AsyncResult[Any]]], rows: list[Ended]
    ) -> list[tuple[Any, Exception | None]] | Exception:
        """Run everything in one transaction. In the database's thread; nothing of gevent's may be used here."""
        db, ledger = self._db, self._ledger
        assert db is not None
        assert ledger is not None
        try:
            db.execute("BEGIN IMMEDIATE")
            if rows:
                write_ended(db, rows)
            elif not calls:
                # Whether the disk takes anything again is found out by writing.
                db.execute("UPDATE meta SET probed_at = ?", (time.time(),))
            outcomes = [_outcome(db, operation) for operation, _ in calls]
            db.execute("COMMIT")
            ledger.done()
        except (sqlite3.Error, OSError) as problem:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            return problem
        return outcomes

    def _prune(self) -> None:
        try:
            while any(self.call(lambda db: _prune_some(db, self.retention))):
                gevent.sleep(0.1)
        except RbeeError as problem:
            log.warning("old records could not be removed: %s", problem)


def write_usage(db: sqlite3.Connection, row: Ended) -> None:
    """Write the usage of one job; a second row of it changes nothing."""
    db.execute(
        USAGE,
        (row.id, row.owner, row.key, row.model, row.endpoint, row.prompt_tokens, row.completion_tokens, row.ended_at,
         row.estimated),
    )  # fmt: skip


def open_database(path: Path) -> sqlite3.Connection:
    """Open a database of records, with every table and column of today. Raises: sqlite3.Error."""
    if not path.exists():
        path.touch(mode=0o600)
    db = sqlite3.connect(path, timeout=LOCK_TIMEOUT_MS / 1000, isolation_level=None, check_same_thread=False)
    version = db.execute("SELECT sqlite_version()").fetchone()[0]
    if tuple(int(part) for part in version.split(".")) < OLDEST_SQLITE:
        raise sqlite3.NotSupportedError(f"SQLite {version} is too old; 3.38 or later is needed")
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "mmap_size = 0"):
        db.execute(f"PRAGMA {pragma}")
    db.executescript(SCHEMA + "CREATE TABLE IF NOT EXISTS meta (probed_at REAL NOT NULL) STRICT;")
    for table, column, definition in ADDED:
        if column not in {row[1] for row in db.execute(f"PRAGMA table_info({table})")}:
            db.execute(f"ALTER TABLE {table} ADD COLUMN {column} {definition}")
    db.execute("INSERT INTO meta SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM meta)")
    return db


def write_ended(db: sqlite3.Connection, rows: list[Ended]) -> None:
    """Write requests that have ended, and their usage; a second row of one changes nothing."""
    # One statement for all of them: each step of SQLite gives the interpreter up, and the event loop pays for that.
    text = msgspec.json.encode(rows)
    db.execute(JOBS_OF_ENDED, (text,))
    db.execute(USAGE_OF_ENDED, (text,))


def _outcome(db: sqlite3.Connection, operation: Operation) -> tuple[Any, Exception | None]:
    """Run one operation; its mistakes undo what it wrote and nothing else. Raises: sqlite3.OperationalError."""
    db.execute("SAVEPOINT one")
    try:
        value = operation(db)
    except sqlite3.OperationalError:
        raise  # the disk or the lock: it concerns everyone
    except Exception as problem:  # noqa: BLE001  it is raised again where the operation was asked for
        db.execute("ROLLBACK TO one")
        db.execute("RELEASE one")
        return None, problem
    db.execute("RELEASE one")
    return value, None


def _prune_some(db: sqlite3.Connection, retention: Retention) -> list[int]:
    """Remove a bounded number of what is too old, and return how much of each kind it was."""
    now, limit = time.time(), PRUNE_AT_ONCE
    old = "SELECT rowid FROM {} WHERE {} LIMIT ?"
    statements = [
        (f"DELETE FROM usage WHERE rowid IN ({old.format('usage', 'ended_at < ?')})", now - retention.usage_s),
        (f"DELETE FROM answers WHERE rowid IN ({old.format('answers', 'made_at < ?')})", now - IDEMPOTENCY_S),
        (
            f"DELETE FROM jobs WHERE rowid IN ({old.format('jobs', 'ended_at > 0 AND ended_at < ?')})",
            now - retention.jobs_s,
        ),
        (
            "UPDATE jobs SET response = NULL, events = NULL WHERE rowid IN ("
            + old.format("jobs", "ended_at > 0 AND ended_at < ? AND (response NOT NULL OR events NOT NULL)")
            + ")",
            now - retention.results_s,
        ),
    ]
    counts = [db.execute(statement, (before, limit)).rowcount for statement, before in statements]
    surplus = db.execute("SELECT max(0, count(*) - ?) FROM answers", (MAX_ANSWERS,)).fetchone()[0]
    db.execute("DELETE FROM answers WHERE rowid IN (SELECT rowid FROM answers ORDER BY made_at LIMIT ?)", (surplus,))
    return counts
