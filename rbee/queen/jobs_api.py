"""`/v1/jobs` and `/v2/tasks`: jobs that nobody waits for, and what became of every job."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import falcon
import msgspec

from rbee.errors import InvalidRequest, NotFound
from rbee.queen import body, job_rows
from rbee.queen.accounts import live_view
from rbee.queen.client_watch import ClientWatch
from rbee.queen.idempotency import Kept
from rbee.queen.job import Job as RunningJob
from rbee.queen.job_events import EventLog, replay
from rbee.queen.job_rows import Wishes, scope_of
from rbee.queen.ledger import owner_of
from rbee.queen.openai import (
    STREAM_HEADERS,
    answer,
    hive_wish,
    job_priority,
    job_tags,
    region_wish,
    request_timeout,
    tell_limits,
)
from rbee.queen.records import Operation
from rbee.wire.jobs import CreateJob, JobCreated, JobList, JobStatus, JobView, TaskRequest
from rbee.wire.openai import decode, parse

if TYPE_CHECKING:
    from rbee.queen.app import Queen

MAX_LIMIT = 100
JOB_DECODER = msgspec.json.Decoder(CreateJob)


class Jobs:
    """All jobs of the caller."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        caller = self._queen.access.caller(req.env)
        tell_limits(self._queen, resp, caller)
        data = body.read(req)
        wanted = parse(data, JOB_DECODER)
        wishes, timeout_s = wishes_of(req), request_timeout(req)

        def create(keep: Callable[[Kept], Operation] | None = None) -> Kept:
            made: list[Kept] = []

            def along(job_id: str) -> Operation:
                made.append(_created(job_id))
                return keep(made[0]) if keep is not None else lambda db: None

            self._queen.background.create(caller, wanted, along, wishes=wishes, timeout_s=timeout_s)
            return made[0]

        key = req.get_header("Idempotency-Key")
        if key is None:
            kept = create()
        else:
            kept = self._queen.idempotency.accept(owner_of(caller), key, req.path, data, create)
        resp.status = kept.status
        resp.set_header("X-Rbee-Job", kept.job)
        resp.set_header("Location", f"/v1/jobs/{kept.job}")
        resp.content_type = kept.content_type
        resp.data = kept.body

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        caller = self._queen.access.caller(req.env)
        scope, after = scope_of(caller), req.get_param("after")
        status, model = req.get_param("status"), req.get_param("model")
        limit = limit_of(req)
        if status is not None and status not in list(JobStatus):
            raise InvalidRequest(f"There is no status {status[:40]!r}", hint=", ".join(JobStatus), param="status")
        live = [
            live_view(job)
            for job in self._queen.background.requests(scope)
            if status in (None, JobStatus.RUNNING) and model in (None, job.request.model) and job.id < (after or "k")
        ]
        page = self._queen.records.call(
            lambda db: job_rows.page(db, scope, status=status, model=model, after=after, limit=limit)
        )
        page = msgspec.structs.replace(page, data=[self._queen.background.placed(one) for one in page.data])
        resp.data = msgspec.json.encode(_merged(page, live, limit))


class Job:
    """One job."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        scope = scope_of(self._queen.access.caller(req.env))
        resp.data = msgspec.json.encode(self._view(job_id, scope))

    def on_delete(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        scope = scope_of(self._queen.access.caller(req.env))
        resp.data = msgspec.json.encode(self._queen.background.cancel(job_id, scope))

    def _view(self, job_id: str, scope: str | None) -> JobView:
        running = self._queen.background.request(job_id, scope)
        if running is not None:
            return live_view(running)
        return self._queen.background.placed(self._queen.records.call(lambda db: job_rows.view(db, job_id, scope)))


class JobStream:
    """The events of one job of `POST /v1/jobs`, from its first or from the one after `Last-Event-ID`."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        scope = scope_of(self._queen.access.caller(req.env))
        last_id = _last_event_id(req)
        view = self._queen.records.call(lambda db: job_rows.view(db, job_id, scope))
        if view.kind != "job":
            raise NotFound(f"{job_id} is a {view.kind}: it has no events to follow", hint=f"rbee job show {job_id}")
        resp.content_type = "text/event-stream"
        resp.set_header("X-Rbee-Job", job_id)
        resp.set_headers(STREAM_HEADERS)
        events = self._queen.background.logs.get(job_id)
        if events is not None:
            client = ClientWatch(req.env.get("gunicorn.socket"))
            resp.stream = Followed(events, last_id, client, self._queen.settings.ping_s)
            return
        # It may have ended since it was looked at: its last state is on the disk before its log goes.
        view = self._queen.records.call(lambda db: job_rows.view(db, job_id, scope))
        stored = self._queen.records.call(lambda db: job_rows.events(db, job_id))
        resp.data = replay(stored, last_id) if stored else _last_event(view, last_id)


class Followed:
    """The body of a stream of events; `close` ends the watch of its client."""

    def __init__(self, events: EventLog, last_id: int, client: ClientWatch, ping_s: float) -> None:
        self._chunks = events.follow(last_id, client, ping_s)
        self._client = client

    def __iter__(self) -> Followed:
        return self

    def __next__(self) -> bytes:
        return next(self._chunks)

    def close(self) -> None:
        """End the watch."""
        self._client.close()


class Tasks:
    """One prompt, answered by the endpoint of its capability."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        caller = self._queen.access.caller(req.env)
        task = body.read_json(req, TaskRequest)
        path, data = task.request()
        client = ClientWatch(req.env.get("gunicorn.socket"), request_timeout(req))
        try:
            request = decode(path, data)
            request.priority = task.priority
            job = RunningJob(path, request, data, caller, client, hive_wish(req))
            job.priority, job.said = job_priority(req, request, caller)
            job.region, job.tags = region_wish(req), job_tags(req)
        except BaseException:
            client.close()
            raise
        answer(self._queen, req, resp, job)


def wishes_of(req: falcon.Request) -> Wishes:
    """Return where the client wants jobs to run that nobody waits for. Raises: InvalidRequest."""
    return Wishes(hive=hive_wish(req) or "", region=region_wish(req), tags=job_tags(req))


def limit_of(req: falcon.Request, default: int = 20, most: int = MAX_LIMIT) -> int:
    """Return how many entries of a list are asked for. Raises: InvalidRequest."""
    try:
        limit = int(req.get_param("limit") or default)
    except ValueError:
        limit = 0
    if not 1 <= limit <= most:
        raise InvalidRequest(f"limit must be a number from 1 to {most}", param="limit")
    return limit


def _created(job_id: str) -> Kept:
    data = msgspec.json.encode(JobCreated(job_id=job_id, status=JobStatus.QUEUED))
    return Kept(b"", job_id, 202, "application/json", data)


def _merged(page: JobList, live: list[JobView], limit: int) -> JobList:
    """Put the jobs that clients wait for among those of the records; a job may have gone from here to there."""
    views = {view.id: view for view in [*live, *page.data]}
    found = sorted(views.values(), key=lambda view: view.id, reverse=True)
    shown = found[:limit]
    return JobList(
        data=shown,
        has_more=page.has_more or len(found) > limit,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
    )


def _last_event_id(req: falcon.Request) -> int:
    """One that this queen never gave asks for everything: a client that reconnects has no way to mend it."""
    given = req.get_header("Last-Event-ID") or "0"
    return int(given) if given.isascii() and given.isdigit() and len(given) < 12 else 0


def _last_event(view: JobView, last_id: int) -> bytes:
    """Return the end of a job whose events are not kept."""
    name = "done" if view.status is JobStatus.COMPLETED else "error"
    facts = {"job_id": view.id, "status": view.status, "usage": view.usage, "error": view.error}
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (last_id + 1, name.encode(), msgspec.json.encode(facts))
