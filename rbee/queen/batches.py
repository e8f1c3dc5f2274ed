"""Batches: every line of a file is a job of priority batch, and the answers are files again.

validating ─▶ in_progress ─▶ finalizing ─▶ completed        (a bad file: validating ─▶ failed)
                  ├─ cancelled ─▶ cancelling ─▶ cancelled
                  └─ after 24 h ─────────────▶ expired
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from sqlite3 import Connection

import gevent
import msgspec

from rbee.errors import InvalidRequest, RbeeError, StorageProblem
from rbee.queen import batch_rows, job_rows
from rbee.queen.access import Caller
from rbee.queen.background import Background
from rbee.queen.batch_lines import Line, check_file
from rbee.queen.batch_rows import LineEnd
from rbee.queen.files import FileStore, insert_output
from rbee.queen.job import new_id
from rbee.queen.job_rows import NO_WISHES, NewJob, Wishes
from rbee.queen.ledger import caller_text, owner_of
from rbee.queen.owners import Signature, timed_id
from rbee.queen.records import Records
from rbee.wire.jobs import (
    Batch,
    BatchList,
    BatchProblem,
    BatchProblems,
    CreateBatch,
    FileObject,
    JobStatus,
    RequestCounts,
)

log = logging.getLogger("rbee.queen.batches")

WINDOW_S = 86400
MAX_OPEN = 100
"""Batches of one owner that may be under way at once."""
INSERT_AT_ONCE, READ_AT_ONCE = 1000, 200
LOOK_EVERY_S = 1.0


@dataclass
class Running:
    """A batch that is under way: its lines that are not over yet, and the word for its end."""

    state: Batch
    owner: str
    key: str
    left: int = 0
    end: str = "completed"


class Batches:
    """The batches of one queen."""

    def __init__(self, records: Records, files: FileStore, background: Background) -> None:
        self._records = records
        self._files = files
        self._background = background
        self._running: dict[str, Running] = {}

    def create(
        self,
        caller: Caller,
        wanted: CreateBatch,
        scope: str | None,
        *,
        wishes: Wishes = NO_WISHES,
        timeout_s: float | None = None,
    ) -> Batch:
        """Accept a batch once it is on the disk; `wishes` hold for all its lines, and it expires after `timeout_s`.

        Raises: NotFound, InvalidRequest, RateLimited, StorageProblem.
        """
        file = self._files.get(wanted.input_file_id, scope)
        if file.purpose != "batch":
            raise InvalidRequest(f"The purpose of {file.id} is {file.purpose!r}, not 'batch'", param="input_file_id")
        now = int(time.time())
        state = Batch(
            id=timed_id("batch_", now),
            endpoint=wanted.endpoint,
            input_file_id=file.id,
            created_at=now,
            expires_at=math.ceil(time.time() + (WINDOW_S if timeout_s is None else min(timeout_s, WINDOW_S))),
            metadata=wanted.metadata,
        )
        run = Running(state, owner_of(caller), caller.id)
        row = (state, run.owner, caller_text(caller), wishes.text)
        self._records.call(lambda db: batch_rows.insert(db, *row, limit=MAX_OPEN))
        self._running[state.id] = run
        gevent.spawn(self._begin, run)
        return state

    def get(self, batch_id: str, owner: str | None) -> Batch:
        """Return a batch. Raises: NotFound, also for one of another owner."""
        run = self._running.get(batch_id)
        if run is not None and owner in (None, run.owner):
            return run.state
        return self._records.call(lambda db: batch_rows.get(db, batch_id, owner))

    def page(self, owner: str | None, *, after: str | None, limit: int) -> BatchList:
        """Return some batches, the newest first."""
        page = self._records.call(lambda db: batch_rows.page(db, owner, after, limit))
        shown = [self._running[one.id].state if one.id in self._running else one for one in page.data]
        return msgspec.structs.replace(page, data=shown)

    def cancel(self, batch_id: str, owner: str | None) -> Batch:
        """Begin to cancel a batch. Raises: NotFound; InvalidRequest when it is over."""
        state = self.get(batch_id, owner)
        run = self._running.get(batch_id)
        if run is None or state.status in ("finalizing", "cancelling"):
            raise InvalidRequest(f"The batch {batch_id} is {state.status}", hint="a batch that is not over")
        state.cancelling_at = int(time.time())
        if state.status == "validating":
            state.status = "cancelling"  # whoever validates it looks at this
            self._records.call(lambda db: batch_rows.save(db, state))
        else:
            self._stop(run, "cancelling", "cancelled")
        return state

    def ended(self, batch: str, job_id: str, status: JobStatus) -> None:
        """Count a line that has ended."""
        run = self._running.get(batch)
        if run is None:
            return
        run.left -= 1
        if status is JobStatus.COMPLETED:
            run.state.request_counts.completed += 1
        else:
            run.state.request_counts.failed += 1
        self._end_if_done(run)

    def recover(self) -> set[str]:
        """Take up what an earlier process left, and return the batches whose queued lines are to be run."""
        for owner, key, state in self._records.call(batch_rows.open_ones):
            if state.id in self._running:
                continue  # it came a moment ago
            run = self._running[state.id] = Running(state, owner, key)
            if state.status == "validating":
                gevent.spawn(self._begin, run)
            elif state.status == "in_progress":
                self._count(run)
                self._end_if_done(run)
            else:
                self._count(run)
                self._stop(run, "cancelling", "cancelled")
        gevent.spawn(self._expire)
        return {run.state.id for run in self._running.values() if run.state.status == "in_progress"}

    def _begin(self, run: Running) -> None:
        """Check the input file and make a job of each line."""
        try:
            lines, problems = check_file(self._files.path(run.state.input_file_id), run.state.endpoint)
            if run.state.status == "cancelling":
                self._stop(run, "cancelling", "cancelled")
            elif problems:
                self._refuse(run, problems)
            else:
                self._put(run, lines)
        except (RbeeError, OSError) as problem:
            log.warning("%s: %s", run.state.id, problem)
            self._refuse(run, [BatchProblem(message="The input file cannot be read", code="file_unreadable")])

    def _refuse(self, run: Running, problems: list[BatchProblem]) -> None:
        run.state.status, run.state.failed_at = "failed", int(time.time())
        run.state.errors = BatchProblems(data=problems[:100])
        self._close(run, [])

    def _put(self, run: Running, lines: list[Line]) -> None:
        state, base = run.state, new_id().removesuffix(Signature.text)
        jobs = [
            NewJob(
                id=f"{base}{line.number:06x}{Signature.text}",
                owner=run.owner,
                key=run.key,
                endpoint=state.endpoint,
                model=line.model,
                created_at=float(state.created_at),
                kind="batch",
                priority="batch",
                batch=state.id,
                line=line.number,
                custom_id=line.custom_id,
                at_byte=line.at_byte,
                size_bytes=line.size_bytes,
            )
            for line in lines
        ]
        self._call_surely(lambda db: batch_rows.forget_lines(db, state.id))
        for start in range(0, len(jobs), INSERT_AT_ONCE):
            some = jobs[start : start + INSERT_AT_ONCE]
            self._call_surely(lambda db, some=some: job_rows.insert_all(db, some))  # type: ignore[misc]
        if state.status != "validating":
            self._stop(run, "cancelling", "cancelled")
            return
        state.request_counts = RequestCounts(total=len(jobs))
        state.status, state.in_progress_at = "in_progress", int(time.time())
        run.left = len(jobs)
        self._call_surely(lambda db: batch_rows.save(db, state))
        self._background.put_lines(job.id for job in jobs)

    def _stop(self, run: Running, status: str, end: str) -> None:
        """Let no further line begin, end those that run, and then the batch, with what it has."""
        run.state.status, run.end = status, end
        self._call_surely(lambda db: batch_rows.save(db, run.state))
        stopped, running = self._call_surely(lambda db: batch_rows.stop_lines(db, run.state.id))
        run.left -= stopped
        run.state.request_counts.failed += stopped
        self._background.stop_lines(running, stopped if end == "cancelled" else 0)
        self._end_if_done(run)

    def _count(self, run: Running) -> None:
        counts, run.left = self._call_surely(lambda db: batch_rows.counts(db, run.state.id))
        run.state.request_counts = counts

    def _end_if_done(self, run: Running) -> None:
        if run.left <= 0 and run.state.finalizing_at is None:
            run.state.finalizing_at = int(time.time())
            gevent.spawn(self._end, run)

    def _end(self, run: Running) -> None:
        """Write the output and error files, and close the batch: all of it, or none of it after a crash."""
        state = run.state
        state.status = "finalizing"
        while True:
            try:
                files = [self._write(run, failed=False), self._write(run, failed=True)]
                break
            except StorageProblem as problem:
                log.warning("%s: its results cannot be written yet: %s", state.id, problem)
                gevent.sleep(1.0)
        output, errors = files
        state.output_file_id = output.id if output else None
        state.error_file_id = errors.id if errors else None
        state.status = run.end
        setattr(state, f"{run.end}_at", int(time.time()))
        self._close(run, [file for file in files if file])

    def _write(self, run: Running, *, failed: bool) -> FileObject | None:
        pieces = self._lines(run, failed=failed)
        first = next(pieces, None)
        if first is None:
            return None

        def whole() -> Iterator[bytes]:
            yield first
            yield from pieces

        name = f"{run.state.id}_{'error' if failed else 'output'}.jsonl"
        return self._files.store(whole(), filename=name, purpose="batch_output")

    def _lines(self, run: Running, *, failed: bool) -> Iterator[bytes]:
        after = 0
        while True:
            page: list[LineEnd] = self._records.call(
                lambda db, after=after: batch_rows.ended_lines(db, run.state.id, after, READ_AT_ONCE)  # type: ignore[misc]
            )
            if not page:
                return
            after = page[-1].line
            data = b"".join(line.text(run.end) for line in page if (line.status != JobStatus.COMPLETED) is failed)
            if data:
                yield data

    def _close(self, run: Running, files: list[FileObject]) -> None:
        def write(db: Connection) -> None:
            for file in files:
                insert_output(db, file, run.owner)
            batch_rows.close(db, run.state)

        self._call_surely(write)
        self._running.pop(run.state.id, None)
        log.info("%s %s", run.state.id, run.state.status)

    def _expire(self) -> None:
        while True:
            gevent.sleep(LOOK_EVERY_S)
            for run in list(self._running.values()):
                if run.state.status == "in_progress" and run.state.expires_at <= time.time():
                    self._stop(run, "in_progress", "expired")

    def _call_surely(self, operation: batch_rows.Work[batch_rows.R]) -> batch_rows.R:
        while True:
            try:
                return self._records.call(operation)
            except StorageProblem as problem:
                log.warning("a batch waits for the records: %s", problem)
                gevent.sleep(1.0)
