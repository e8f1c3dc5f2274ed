"""The jobs that nobody waits for: accepted once they are on the disk, run in their turn, found again after a crash.

queued ──taken──▶ running ──▶ completed | failed | cancelled
   ▲                 │
   └── queen ended, nothing of the answer shown    (shown: ──▶ interrupted)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from sqlite3 import Connection
from typing import TYPE_CHECKING, Protocol

import gevent
import msgspec
from gevent.pool import Pool
from gevent.queue import PriorityQueue

from rbee.errors import Busy, DeadlineExceeded, Lost, RateLimited, RbeeError, ShuttingDown, StorageProblem, TimedOut
from rbee.logs import serving
from rbee.queen import job_rows
from rbee.queen.access import Caller
from rbee.queen.accounts import ended_row, error_of, live_view, status_of, unread_row
from rbee.queen.client_watch import ClientGone, ClientWatch
from rbee.queen.job import Job, new_id
from rbee.queen.job_events import DELTA, DONE, ERROR, QUEUED, STARTED, EventLog, payloads
from rbee.queen.job_rows import NO_WISHES, JobEnd, NewJob, TakenJob, Wishes
from rbee.queen.jobs import Jobs
from rbee.queen.ledger import caller_of, caller_text, owner_of
from rbee.queen.records import Operation, Records
from rbee.wire.errors import ErrorDetail, encode_detail
from rbee.wire.jobs import PRIORITIES, CreateJob, JobStatus, JobUsage, JobView
from rbee.wire.openai import decode

if TYPE_CHECKING:
    from rbee.queen.batches import Batches
    from rbee.queen.files import FileStore

log = logging.getLogger("rbee.queen.background")

JOBS_AT_ONCE, LINES_AT_ONCE = 64, 16
MAX_WAITING = 10_000
"""Jobs of one owner that may wait or run; those of batches are bounded by their files."""
MAX_AGE_S = 86400.0
LONGEST_PAUSE_S = 10.0
MAX_LOSSES = 4
"""Runs that may end with a lost worker. Nobody has seen anything of an answer that is not streamed."""
CANCEL_TIMEOUT_S = 10.0
SWEEP_EVERY_S = 3600.0
INTERRUPTED = ErrorDetail(
    message="The queen ended while this answer was being streamed; the job is not run again",
    type="server_error",
    code="interrupted",
)
CANCELLED = error_of(ClientGone())

Entry = tuple[int, str]


class Watcher(Protocol):
    """Who wants to know of the lines of a batch."""

    def ended(self, batch: str, job_id: str, status: JobStatus) -> None:
        """Called when a line has ended, after it is on the disk."""


class Background:
    """Runs the jobs of the records. `logs` holds the events of those that are not over yet."""

    def __init__(
        self, jobs: Jobs, records: Records, files: FileStore, *, draining_since: Callable[[], float | None]
    ) -> None:
        self.logs: dict[str, EventLog] = {}
        self._jobs = jobs
        self._records = records
        self._files = files
        self._draining_since = draining_since
        self._waiting: PriorityQueue[Entry] = PriorityQueue()
        self._lines: PriorityQueue[Entry] = PriorityQueue()
        self._clients: dict[str, ClientWatch] = {}
        self._watcher: Watcher | None = None

    def start(self, batches: Batches) -> None:
        """Take up what an earlier process left, and begin to run jobs."""
        self._watcher = batches
        gevent.spawn(self._start, batches)

    def create(
        self,
        caller: Caller,
        wanted: CreateJob,
        answer: Callable[[str], Operation] | None,
        *,
        wishes: Wishes = NO_WISHES,
        timeout_s: float | None = None,
    ) -> str:
        """Accept a job and return its id once it is on the disk.

        `answer` makes the operation that belongs in the same transaction; `timeout_s` counts from this moment.
        Raises: InvalidRequest, NotSupported, RateLimited, StorageProblem.
        """
        body = bytes(wanted.body)
        request = decode(wanted.endpoint, body)
        self._records.check()
        job_id, now = new_id(), time.time()
        priority, said = caller.policy.heard(wanted.priority)
        new = NewJob(
            id=job_id,
            owner=owner_of(caller),
            key=caller.id,
            endpoint=wanted.endpoint,
            model=request.model,
            created_at=now,
            priority=priority,
            metadata=wanted.metadata,
            body=body,
            caller=caller_text(caller),
            wishes=msgspec.structs.replace(wishes, said=said if said != priority else ""),
            deadline_at=now + timeout_s if timeout_s is not None else 0.0,
        )
        along = answer(job_id) if answer else None
        self._records.call(lambda db: _accept(db, new, along))
        self.logs[job_id] = _new_log(job_id)
        self._keep_deadline(job_id, new.deadline_at)
        self._waiting.put((PRIORITIES.index(new.priority), job_id))
        return job_id

    def request(self, job_id: str, owner: str | None) -> Job | None:
        """Return a job that a client waits for at present, if it is one of this owner's."""
        return next((job for job in self.requests(owner) if job.id == job_id), None)

    def requests(self, owner: str | None) -> list[Job]:
        """Return the jobs of an owner (None: everyone's) that clients wait for at present."""
        live = self._jobs.live.values()
        return [job for job in live if job.kind == "request" and owner in (None, owner_of(job.caller))]

    def placed(self, view: JobView) -> JobView:
        """Return a view with the worker that the job runs at; the records have it when it is over."""
        job = self._jobs.live.get(view.id)
        return msgspec.structs.replace(view, worker=job.worker_id) if job is not None and not view.worker else view

    def put_lines(self, job_ids: Iterable[str]) -> None:
        """Have lines of a batch run, whose jobs are in the records."""
        for job_id in job_ids:
            self._lines.put((0, job_id))

    def cancel(self, job_id: str, owner: str | None) -> JobView:
        """Cancel a job in whatever phase it is, and return what became of it. Raises: NotFound."""
        running = self.request(job_id, owner)
        if running is not None:
            running.client.leave()  # the request that waits for it records its end
            return live_view(running, JobStatus.CANCELLED)
        view = self._records.call(lambda db: job_rows.view(db, job_id, owner))
        if view.status.final:
            return view
        events = self._log(job_id)
        cancelled = self._end_queued(job_id, events, JobStatus.CANCELLED, CANCELLED)
        if not cancelled and job_id in self._clients:
            self._clients[job_id].leave()
            deadline = time.monotonic() + CANCEL_TIMEOUT_S
            while job_id in self._clients and time.monotonic() < deadline:
                gevent.sleep(0.005)
        return self._records.call(lambda db: job_rows.view(db, job_id, owner))

    def stop_lines(self, job_ids: Iterable[str], never_begun: int) -> None:
        """Cancel those of some lines that run at present; nobody waits for their end here. Others had not begun."""
        self._jobs.never_begun(never_begun)
        for job_id in job_ids:
            if job_id in self._clients:
                self._clients[job_id].leave()

    def _keep_deadline(self, job_id: str, deadline_at: float) -> None:
        if deadline_at:
            gevent.spawn_later(max(0.0, deadline_at - time.time()), self._out_of_time, job_id)

    def _out_of_time(self, job_id: str) -> None:
        """End a job whose client allowed no more time, whether it runs or not."""
        problem = DeadlineExceeded("The job was not done within its time (X-Request-Timeout)")
        if job_id in self._clients:
            self._clients[job_id].end(problem)
            return
        try:
            self._end_queued(job_id, self._log(job_id), JobStatus.FAILED, error_of(problem))
        except StorageProblem as trouble:
            log.warning("job %s: its end cannot be recorded yet: %s", job_id, trouble)
            gevent.spawn_later(1.0, self._out_of_time, job_id)

    def _end_queued(self, job_id: str, events: EventLog, status: JobStatus, why: ErrorDetail) -> bool:
        facts = {"status": status, "error": why}
        error, kept = encode_detail(why), events.ending(ERROR, **facts)
        if not self._records.call(lambda db: job_rows.end_queued(db, job_id, status, error, kept)):
            return False
        self._jobs.never_begun()
        events.tell(ERROR, **facts)
        self.logs.pop(job_id, None)
        return True

    def _start(self, batches: Batches) -> None:
        while True:
            try:
                waiting = self._records.call(lambda db: job_rows.recover(db, encode_detail(INTERRUPTED)))
                under_way = batches.recover()
                break
            except StorageProblem:
                gevent.sleep(1.0)
        for one in waiting:
            if one.batch is None:
                self._log(one.id)
                self._keep_deadline(one.id, one.deadline_at)
                self._waiting.put((PRIORITIES.index(one.priority), one.id))
            elif one.batch in under_way:
                self._lines.put((0, one.id))
        gevent.spawn(self._sweep)
        gevent.spawn(self._run_from, self._waiting, Pool(JOBS_AT_ONCE))
        gevent.spawn(self._run_from, self._lines, Pool(LINES_AT_ONCE))

    def _sweep(self) -> None:
        while True:
            try:
                self._files.sweep(self._records.retention.results_s)
            except StorageProblem as problem:
                log.warning("old files could not be removed: %s", problem)
            gevent.sleep(SWEEP_EVERY_S)

    def _run_from(self, queue: PriorityQueue[Entry], pool: Pool) -> None:
        while True:
            pool.wait_available()
            _, job_id = queue.get()
            if self._draining_since() is not None:
                return  # what is queued stays on the disk
            pool.spawn(self._run, job_id)

    def _run(self, job_id: str) -> None:
        client = self._clients[job_id] = ClientWatch(None)
        serving(job_id)
        try:
            taken = self._taken(job_id)
            if taken is not None:
                self._run_taken(taken, client)
        except Exception:
            log.exception("job %s was left as it is", job_id)
        finally:
            self._clients.pop(job_id, None)

    def _taken(self, job_id: str) -> TakenJob | None:
        while self._draining_since() is None:
            try:
                # A commit of its own would hold up those who wait for theirs.
                return self._records.call(lambda db: job_rows.take(db, job_id), urgent=False)
            except StorageProblem:
                gevent.sleep(1.0)
        return None

    def _run_taken(self, taken: TakenJob, client: ClientWatch) -> None:
        events = self._log(taken.id) if taken.batch is None else EventLog(taken.id)
        job, response, problem = None, None, None
        try:
            job = self._job(taken, client, events)
            response = self._answer(job, client, events, time.time() + MAX_AGE_S - (time.time() - taken.created_at))
            problem = job.problem
        except (RbeeError, ClientGone) as found:
            problem = found
        except Exception as found:
            log.exception("job %s failed", taken.id)
            problem = found
        ends = self._draining_since() is not None and isinstance(problem, RbeeError)
        if ends and not (job and job.answering):
            return  # what is around a queen that ends, ends too; the next process runs this job
        self._finish(taken, job, events, response, problem)

    def _job(self, taken: TakenJob, client: ClientWatch, events: EventLog) -> Job:
        body = taken.body
        if body is None:
            body = self._files.part(taken)
        job = Job(taken.endpoint, decode(taken.endpoint, body), body, caller_of(taken.caller), client)
        job.id, job.kind, job.metadata = taken.id, taken.kind, taken.metadata
        job.priority, job.said = taken.priority, taken.wishes.said
        job.hive_wish, job.region, job.tags = taken.wishes.hive or None, taken.wishes.region, taken.wishes.tags
        job.created_at = taken.created_at
        job.on_event = lambda name, place: None if name == STARTED else events.tell(name, worker=place)
        return job

    def _answer(self, job: Job, client: ClientWatch, events: EventLog, until: float) -> bytes | None:
        """Run a job until it is answered; while there is no room for it, it waits. Returns a whole answer's bytes."""
        losses = 0
        while True:
            client.check()
            try:
                reply = self._jobs.run(job)
                break
            except ShuttingDown:
                raise
            except Busy as problem:
                left_s = until - time.time()
                if left_s <= 0:
                    raise TimedOut(f"There was no room for this job within {MAX_AGE_S / 3600:g} h: {problem}") from None
                pause_s = min(max(problem.retry_after_s, 0.2), LONGEST_PAUSE_S, left_s)
            except Lost:
                losses += 1
                if losses >= MAX_LOSSES:
                    raise
                pause_s = float(losses)
            job.attempts = 0
            client.gone.wait(timeout=pause_s)
        if isinstance(reply.body, bytes):
            events.tell(STARTED, worker=job.worker_id)
            events.add(DELTA, b" ".join(reply.body.split(b"\n")))
            return reply.body
        try:
            self._stream(job, reply.body, events)
        finally:
            # A stream that was not read to its end still holds its worker.
            getattr(reply.body, "close", lambda: None)()
        return None

    def _stream(self, job: Job, chunks: Iterable[bytes], events: EventLog) -> None:
        job.answering = True
        self._records.call(lambda db: job_rows.mark_streaming(db, job.id))
        events.tell(STARTED, worker=job.worker_id)
        rest = b""
        for chunk in chunks:
            found, rest = payloads(rest, chunk)
            for data in found:
                events.add(DELTA, data)

    def _finish(
        self, taken: TakenJob, job: Job | None, events: EventLog, response: bytes | None, problem: BaseException | None
    ) -> None:
        status = status_of(problem)
        if job is not None:
            row = msgspec.structs.replace(ended_row(job, problem), owner=taken.owner)
        else:  # its file is gone, or is not what it was when it was accepted
            row = unread_row(taken, problem)
        usage = JobUsage(
            prompt_tokens=row.prompt_tokens, completion_tokens=row.completion_tokens, estimated=row.estimated
        )
        facts: dict[str, object] = {"status": status, "usage": usage}
        if problem is not None:
            facts["error"] = error_of(problem)
        last = DONE if problem is None else ERROR
        kept = events.ending(last, **facts) if taken.batch is None else b""
        end = JobEnd(status=status, row=row, response=response, events=kept)
        while True:
            try:
                self._records.call(lambda db: job_rows.finish(db, end))
                break
            except StorageProblem as trouble:
                log.warning("job %s: its end cannot be recorded yet: %s", taken.id, trouble)
                gevent.sleep(1.0)
        log.info("job %s %s at %s", taken.id, status, row.worker or "no worker")
        if taken.batch is not None:
            assert self._watcher is not None
            self._watcher.ended(taken.batch, taken.id, status)
            return
        events.tell(last, **facts)
        self.logs.pop(taken.id, None)

    def _log(self, job_id: str) -> EventLog:
        return self.logs.setdefault(job_id, _new_log(job_id))


def _accept(db: Connection, new: NewJob, along: Operation | None) -> None:
    count = job_rows.waiting_count(db, new.owner)
    if count >= MAX_WAITING:
        raise RateLimited(f"{count} jobs of yours wait already, which is the limit", retry_after_s=30)
    job_rows.insert(db, new)
    if along is not None:
        along(db)


def _new_log(job_id: str) -> EventLog:
    events = EventLog(job_id)
    events.tell(QUEUED, status=JobStatus.QUEUED)
    return events
