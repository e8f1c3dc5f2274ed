"""Take over the records of a server process that is no more, because the queen was started with fewer of them."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rbee.queen.ledger import Ended, Ledger

log = logging.getLogger("rbee.queen.records")

TABLES = ("jobs", "usage", "answers", "files", "batches")
DATABASE, LOCK, FILES = "records.sqlite", "lock", "files"

Open = Callable[[Path], sqlite3.Connection]
WriteEnded = Callable[[sqlite3.Connection, list[Ended]], None]


def adopt(db: sqlite3.Connection, folder: Path, orphans: Sequence[Path], reopen: Open, write_ended: WriteEnded) -> None:
    """Bring what lies in other folders into the records of this one, and remove them.

    Every step can be done again after a crash. Raises: sqlite3.Error, OSError.
    """
    for orphan in orphans:
        if not (orphan / DATABASE).exists():
            continue
        with _locked(orphan) as free:
            if not free:
                log.warning("%s is in use by another process, and is left as it is", orphan)
                continue
            _take_files(orphan / FILES, folder / FILES)
            _finish(orphan, reopen, write_ended)
            _copy(db, orphan / DATABASE)
            shutil.rmtree(orphan)
            log.info("took over the records in %s", orphan)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _take_files(source: Path, target: Path) -> None:
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in source.iterdir() if source.is_dir() else ():
        os.replace(path, target / path.name)


def _finish(orphan: Path, reopen: Open, write_ended: WriteEnded) -> None:
    """Bring the ledger into the database, and its tables up to date; only one connection may have it at a time."""
    ledger = Ledger(orphan)
    other = reopen(orphan / DATABASE)
    try:
        if ledger.rows:
            write_ended(other, ledger.rows)
    finally:
        other.close()
        ledger.close()


def _copy(db: sqlite3.Connection, path: Path) -> None:
    db.execute("ATTACH ? AS orphan", (str(path),))
    try:
        db.execute("BEGIN IMMEDIATE")
        for table in TABLES:
            names = ", ".join(row[1] for row in db.execute(f"PRAGMA orphan.table_info({table})"))
            db.execute(f"INSERT OR IGNORE INTO main.{table} ({names}) SELECT {names} FROM orphan.{table}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    finally:
        db.execute("DETACH orphan")
