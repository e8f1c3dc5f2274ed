"""Files that clients leave for batches, and batches for clients: bytes on the disk, a row in the records."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from sqlite3 import Connection
from typing import TypeVar

import gevent

from rbee import paths
from rbee.errors import InvalidRequest, NotFound, PayloadTooLarge, RateLimited, StorageProblem
from rbee.queen.job_rows import NEWEST, TakenJob, older
from rbee.queen.owners import made_at, timed_id
from rbee.queen.records import Records
from rbee.wire.jobs import FileList, FileObject

T = TypeVar("T")

MAX_FILE_BYTES = 200_000_000
"""As OpenAI has it for the input of a batch."""
MAX_STORED_BYTES = 4_000_000_000
"""All files of one owner together."""
PIECE_BYTES = 262_144
PREFIX, UPLOAD = "file-", ".upload-"
COLUMNS = "id, bytes, created_at, filename, purpose"


class FileStore:
    """The files in one folder, each under its id; a name that a client gave is never part of a path."""

    def __init__(self, folder: Path, records: Records) -> None:
        self._folder = folder
        self._records = records

    def write(self, pieces: Iterable[bytes], *, owner: str, filename: str, purpose: str) -> FileObject:
        """Store a file as its pieces come, and return it once it is on the disk.

        Raises: PayloadTooLarge, RateLimited when the owner stores too much, StorageProblem when the disk is full.
        """
        row = self.store(pieces, filename=filename, purpose=purpose)
        try:
            self._records.call(lambda db: _insert(db, row, owner))
        except BaseException:
            self.path(row.id).unlink(missing_ok=True)
            raise
        return row

    def store(self, pieces: Iterable[bytes], *, filename: str, purpose: str) -> FileObject:
        """Bring the bytes of a file to the disk, and return the row that is still to be written for it.

        Raises: PayloadTooLarge, StorageProblem.
        """
        upload = self._folder / f"{UPLOAD}{secrets.token_hex(16)}"
        made_at = int(time.time())
        file_id = timed_id(PREFIX, made_at)
        try:
            paths.private(self._folder)
            size = self._receive(upload, pieces)
            _off_hub(lambda: _settle(upload, self.path(file_id)))
        except OSError as problem:
            raise StorageProblem(f"The file cannot be stored ({problem.strerror})", retry_after_s=30) from None
        finally:
            with contextlib.suppress(OSError):
                upload.unlink(missing_ok=True)
        return FileObject(id=file_id, bytes=size, created_at=made_at, filename=filename, purpose=purpose)

    def get(self, file_id: str, owner: str | None) -> FileObject:
        """Return a file's facts. Raises: NotFound, also for a file of another owner."""
        return self._records.call(lambda db: _get(db, file_id, owner))

    def list(self, owner: str | None, *, purpose: str | None, after: str | None, limit: int) -> FileList:
        """Return some of the files, the newest first."""
        return self._records.call(lambda db: _page(db, owner, purpose, after, limit))

    def delete(self, file_id: str, owner: str | None) -> None:
        """Remove a file. Raises: NotFound; InvalidRequest while a batch needs it."""
        self._records.call(lambda db: _delete(db, file_id, owner))
        path = self._folder / file_id
        _off_hub(lambda: path.unlink(missing_ok=True))

    def path(self, file_id: str) -> Path:
        """Return where the bytes of a file lie whose row was found."""
        return self._folder / file_id

    def content(self, file_id: str) -> Iterator[bytes]:
        """Yield the bytes of a file whose row was found."""
        with self.path(file_id).open("rb") as file:
            while data := _off_hub(lambda: file.read(PIECE_BYTES)):
                yield data

    def part(self, taken: TakenJob) -> bytes:
        """Return the body of a line of a batch. Raises: NotFound when its file is gone or was cut."""
        file_id = self._records.call(lambda db: _input_of(db, taken.batch or ""))

        def read() -> bytes:
            with self.path(file_id).open("rb") as file:
                return os.pread(file.fileno(), taken.size_bytes, taken.at_byte)

        try:
            data = _off_hub(read)
        except OSError:
            data = b""
        if len(data) != taken.size_bytes:
            raise NotFound(f"The input file {file_id} of batch {taken.batch} is not there any more")
        return data

    def sweep(self, results_s: float) -> None:
        """Remove files that are too old, and the bytes of uploads that a killed process left."""
        known = self._records.call(lambda db: _prune(db, time.time() - results_s))

        def remove() -> None:
            for path in self._folder.iterdir():
                # Younger ones may belong to an upload that goes on.
                if path.name not in known and time.time() - path.stat().st_mtime > 3600:
                    path.unlink(missing_ok=True)

        with contextlib.suppress(OSError):
            _off_hub(remove)

    def _receive(self, upload: Path, pieces: Iterable[bytes]) -> int:
        size = 0
        with open(upload, "xb", opener=_private) as file:
            for data in pieces:
                size += len(data)
                if size > MAX_FILE_BYTES:
                    raise PayloadTooLarge(MAX_FILE_BYTES)
                _off_hub(lambda data=data: file.write(data))  # type: ignore[misc]
            _off_hub(file.flush)
            _off_hub(lambda: os.fsync(file.fileno()))
        return size


def _off_hub(work: Callable[[], T]) -> T:
    """Do work in a thread. Raises: what it raises, which gevent would log if it left the thread."""
    found: list[T] = []
    problem = gevent.get_hub().threadpool.apply(_do, (work, found))
    if problem is not None:
        raise problem
    return found[0]


def _do(work: Callable[[], T], found: list[T]) -> OSError | None:
    try:
        found.append(work())
    except OSError as problem:
        return problem
    return None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _settle(upload: Path, path: Path) -> None:
    os.replace(upload, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _insert(db: Connection, row: FileObject, owner: str) -> None:
    stored = db.execute("SELECT coalesce(sum(bytes), 0) FROM files WHERE owner = ?", (owner,)).fetchone()[0]
    if stored + row.bytes > MAX_STORED_BYTES:
        raise RateLimited(
            f"Your files already hold {stored} bytes; at most {MAX_STORED_BYTES} are kept",
            retry_after_s=3600,
            hint="DELETE /v1/files/{id}",
        )
    db.execute(
        "INSERT INTO files (id, owner, filename, purpose, bytes, created_at) VALUES (?, ?, ?, ?, ?, ?)",
        (row.id, owner, row.filename, row.purpose, row.bytes, row.created_at),
    )


def insert_output(db: Connection, row: FileObject, owner: str) -> None:
    """Write the row of a file that a batch made, whatever its owner stores already."""
    db.execute(
        "INSERT OR IGNORE INTO files (id, owner, filename, purpose, bytes, created_at) VALUES (?, ?, ?, ?, ?, ?)",
        (row.id, owner, row.filename, row.purpose, row.bytes, row.created_at),
    )


def _get(db: Connection, file_id: str, owner: str | None) -> FileObject:
    row = db.execute(
        f"SELECT {COLUMNS} FROM files WHERE id = ? AND (? IS NULL OR owner = ?)", (file_id, owner, owner)
    ).fetchone()
    if row is None:
        raise NotFound(f"There is no file {file_id[:80]!r}", param="file_id")
    return _object(row)


def _page(db: Connection, owner: str | None, purpose: str | None, after: str | None, limit: int) -> FileList:
    rows = db.execute(
        f"""SELECT {COLUMNS} FROM files WHERE (? IS NULL OR owner = ?) AND (? IS NULL OR purpose = ?)
        AND {older("files")} ORDER BY {NEWEST} LIMIT ?""",
        (owner, owner, purpose, purpose, after, after, made_at(after or ""), after, limit + 1),
    ).fetchall()
    found = [_object(row) for row in rows[:limit]]
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return FileList(data=found, has_more=len(rows) > limit, first_id=first, last_id=last)


def _delete(db: Connection, file_id: str, owner: str | None) -> None:
    _get(db, file_id, owner)
    if db.execute("SELECT 1 FROM batches WHERE open = 1 AND state ->> 'input_file_id' = ?", (file_id,)).fetchone():
        raise InvalidRequest("A batch that is not over needs this file", hint="POST /v1/batches/{id}/cancel first")
    db.execute("DELETE FROM files WHERE id = ?", (file_id,))


def _input_of(db: Connection, batch: str) -> str:
    row = db.execute("SELECT state ->> 'input_file_id' FROM batches WHERE id = ?", (batch,)).fetchone()
    return str(row[0]) if row else "unknown"


def _prune(db: Connection, before: float) -> set[str]:
    db.execute(
        """DELETE FROM files WHERE created_at < ?
        AND id NOT IN (SELECT state ->> 'input_file_id' FROM batches WHERE open = 1)""",
        (before,),
    )
    return {row[0] for row in db.execute("SELECT id FROM files")}


def _object(row: tuple[str, int, float, str, str]) -> FileObject:
    return FileObject(id=row[0], bytes=row[1], created_at=int(row[2]), filename=row[3], purpose=row[4])
