"""The queen's web application: its parts are put together and its routes stand on one page."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import falcon
import gevent

from rbee.errors import Busy, MethodNotAllowed, NotFound, RbeeError
from rbee.queen import batches_api, files_api, gitops, jobs_api, openai, orchestrator, scheduler
from rbee.queen.access import Access
from rbee.queen.admission import Admission
from rbee.queen.background import Background
from rbee.queen.batches import Batches
from rbee.queen.capacity import Capacity
from rbee.queen.client_watch import ClientGone
from rbee.queen.decisions import DecisionLog
from rbee.queen.dispatch import Dispatch
from rbee.queen.files import FileStore
from rbee.queen.fleet import Fleet
from rbee.queen.gitops import Gitops
from rbee.queen.idempotency import Idempotency
from rbee.queen.inventory import FollowedInventory
from rbee.queen.jobs import Jobs
from rbee.queen.jwt_tokens import JwtTokens, read_jwt_settings
from rbee.queen.keys import KeyStore
from rbee.queen.limits import Limits
from rbee.queen.loads import Loads
from rbee.queen.metrics import Metrics
from rbee.queen.records import Records
from rbee.queen.relay import Relay
from rbee.queen.remote import Servers
from rbee.queen.routing import Routing
from rbee.queen.script import RoutingScript
from rbee.queen.settings import Settings
from rbee.queen.waiting import Patience
from rbee.queen.watching import CONNECTING_AT_ONCE, Watching
from rbee.wire.errors import encode_error
from rbee.wire.openai import REQUESTS

log = logging.getLogger("rbee.queen")


@dataclass
class Queen:
    """The parts of one server process."""

    settings: Settings
    fleet: Fleet
    script: RoutingScript
    routing: Routing
    decisions: DecisionLog
    access: Access
    admission: Admission
    jobs: Jobs
    patience: Patience
    records: Records
    background: Background
    batches: Batches
    files: FileStore
    idempotency: Idempotency
    metrics: Metrics
    inventory: FollowedInventory
    gitops: Gitops
    draining_since: Callable[[], float | None]
    started_at: float
    master_pid: int


def create_queen(settings: Settings, *, draining_since: Callable[[], float | None] = lambda: None) -> Queen:
    """Make the parts and introduce them to each other."""
    fleet = Fleet(settings.fleet_path, settings.hive_token, expects_hive=settings.run_hive)
    metrics = Metrics(fleet)
    script = RoutingScript(settings.script_path, settings.script_memory)
    script.reload()
    decisions = DecisionLog(settings.decisions_path)
    routing = Routing(fleet, script, choice_timeout_s=settings.choice_timeout_s, decisions=decisions)
    limits = Limits(settings.limits_path)
    admission = Admission(
        settings.max_in_flight,
        script,
        metrics,
        Capacity(fleet),
        limits=limits,
        queue_limit=settings.queue_limit,
        queue_timeout_s=settings.queue_timeout_s,
        starvation_s=settings.starvation_s,
    )
    records = Records(settings.records_dir, settings.retention)
    jobs = Jobs(
        admission,
        routing,
        Dispatch(
            fleet,
            Loads(fleet, timeout_s=settings.load_timeout_s),
            first_byte_timeout_s=settings.first_byte_timeout_s,
        ),
        Relay(
            metrics,
            ping_s=settings.ping_s,
            first_byte_timeout_s=settings.first_byte_timeout_s,
            silence_timeout_s=settings.silence_timeout_s,
            drain_s=settings.drain_s,
            draining_since=draining_since,
        ),
        metrics,
        records,
    )
    inventory = FollowedInventory(
        settings.inventory_dir, settings.identity_dir, settings.inventory_memory, optional=not settings.declared
    )
    reconciler = Gitops(settings.gitops)
    metrics.show_queues(admission.queues)
    metrics.show(inventory, reconciler)
    issuer = read_jwt_settings(settings.jwt_path)
    access = Access(settings, KeyStore(settings.keys_path), JwtTokens(issuer) if issuer else None)
    files = FileStore(settings.records_dir / "files", records)
    background = Background(jobs, records, files, draining_since=draining_since)
    batches = Batches(records, files, background)
    return Queen(
        settings=settings,
        fleet=fleet,
        script=script,
        routing=routing,
        decisions=decisions,
        access=access,
        admission=admission,
        jobs=jobs,
        patience=Patience(
            admission.status, after_s=settings.ping_s, drain_s=settings.drain_s, draining_since=draining_since
        ),
        records=records,
        background=background,
        batches=batches,
        files=files,
        idempotency=Idempotency(records),
        metrics=metrics,
        inventory=inventory,
        gitops=reconciler,
        draining_since=draining_since,
        started_at=time.time(),
        master_pid=os.getppid(),
    )


def follow_fleet(queen: Queen) -> None:
    """Take up the hives that are known, and begin to follow the inventory and its hives."""
    watching, servers = Watching(queen.fleet), Servers(queen.fleet)

    def watch() -> None:
        # A host with `HivePort none` runs no hive.
        hosts = {host.name: host for host in queen.inventory.hosts if host.hive_port}
        watching.follow(hosts, queen.inventory.identity)
        servers.follow(queen.inventory.hosts)

    gevent.get_hub().threadpool.maxsize = 2 * CONNECTING_AT_ONCE
    gevent.spawn(queen.fleet.recall)
    queen.inventory.look(first=True)
    watch()
    gevent.spawn(queen.inventory.run, watch)
    gevent.spawn(queen.admission.limits.keep)
    gevent.spawn(queen.decisions.run)
    queen.background.start(queen.batches)


def create_app(queen: Queen) -> falcon.App[falcon.Request, falcon.Response]:
    """Return the WSGI application."""
    app = falcon.App()
    app.add_error_handler(Exception, _unexpected)
    app.add_error_handler(falcon.HTTPError, _refused_by_falcon)
    app.add_error_handler(RbeeError, _refused(queen))
    app.add_error_handler(ClientGone, _nobody_waits)

    for path in REQUESTS:
        app.add_route(path, openai.Inference(queen, path))
    app.add_route("/v1/jobs", jobs_api.Jobs(queen))
    app.add_route("/v1/jobs/{job_id}", jobs_api.Job(queen))
    app.add_route("/v1/jobs/{job_id}/stream", jobs_api.JobStream(queen))
    app.add_route("/v2/tasks", jobs_api.Tasks(queen))
    app.add_route("/v1/files", files_api.Files(queen))
    app.add_route("/v1/files/{file_id}", files_api.File(queen))
    app.add_route("/v1/files/{file_id}/content", files_api.FileContent(queen))
    app.add_route("/v1/batches", batches_api.Batches(queen))
    app.add_route("/v1/batches/{batch_id}", batches_api.Batch(queen))
    app.add_route("/v1/batches/{batch_id}/cancel", batches_api.BatchCancel(queen))
    app.add_route("/v1/models", openai.Models(queen))
    app.add_route("/v1/models/{name}", openai.Model(queen))
    app.add_route("/health", openai.Health(queen))
    app.add_route("/metrics", openai.MetricsPage(queen))
    app.add_route("/openapi.json", openai.Schema(queen))

    app.add_route("/gitops/status", gitops.Status(queen))
    app.add_route("/gitops/sync", gitops.Sync(queen))

    app.add_route("/v1/orchestrator/status", orchestrator.Status(queen))
    app.add_route("/v1/orchestrator/scheduler", scheduler.Scheduler(queen))
    app.add_route("/v1/orchestrator/scheduler/reload", scheduler.Reload(queen))
    app.add_route("/v1/orchestrator/scheduler/explain", scheduler.Explain(queen))
    app.add_route("/v1/orchestrator/scheduler/decisions", scheduler.Decisions(queen))
    app.add_route("/v1/orchestrator/hive-report", orchestrator.Reports(queen))
    app.add_route("/v1/orchestrator/worker-ready", orchestrator.ReadyWorkers(queen))
    app.add_route("/v1/orchestrator/shutdown", orchestrator.Shutdown(queen))
    app.add_route("/v1/hives", orchestrator.Hives(queen))
    app.add_route("/v1/hives/{hive}/workers", orchestrator.Workers(queen))
    app.add_route("/v1/hives/{hive}/workers/{name}", orchestrator.Worker(queen))
    app.add_route("/v1/hives/{hive}/workers/{name}/log", orchestrator.WorkerLog(queen))
    app.add_route("/v1/hives/{hive}/models", orchestrator.HiveModels(queen))
    app.add_route("/v1/hives/{hive}/models/{name}", orchestrator.HiveModel(queen))
    return app


ErrorHandler = Callable[[falcon.Request, falcon.Response, BaseException, dict[str, object]], None]


def _refused(queen: Queen) -> ErrorHandler:
    def handle(req: falcon.Request, resp: falcon.Response, problem: BaseException, params: dict[str, object]) -> None:
        assert isinstance(problem, RbeeError)
        queen.metrics.refused(problem.status)
        _answer(req, resp, problem)

    return handle


def _refused_by_falcon(
    req: falcon.Request, resp: falcon.Response, problem: BaseException, params: dict[str, object]
) -> None:
    """Put what Falcon itself refuses (an unknown path, a wrong method) into OpenAI's form."""
    assert isinstance(problem, falcon.HTTPError)
    if isinstance(problem, falcon.HTTPMethodNotAllowed):
        allowed = dict(problem.headers or {})["Allow"].split(", ")
        _answer(req, resp, MethodNotAllowed(req.method, req.path, allowed))
    elif isinstance(problem, falcon.HTTPNotFound):
        _answer(req, resp, NotFound(f"There is nothing at {req.path[:200]}", hint="the paths in /openapi.json"))
    else:
        error = RbeeError(problem.description or problem.title or "The request was refused")
        error.status, error.type, error.code = problem.status_code, "invalid_request_error", "invalid_request"  # type: ignore[misc]
        _answer(req, resp, error)


def _unexpected(req: falcon.Request, resp: falcon.Response, problem: BaseException, params: dict[str, object]) -> None:
    log.error("%s %s failed", req.method, req.path, exc_info=problem)
    _answer(req, resp, RbeeError("An internal error occurred; the queen's log has the details"))


def _nobody_waits(
    req: falcon.Request, resp: falcon.Response, problem: BaseException, params: dict[str, object]
) -> None:
    resp.status = "499 Client Closed Request"


def _answer(req: falcon.Request, resp: falcon.Response, problem: RbeeError) -> None:
    resp.status = problem.status
    resp.data = encode_error(problem, anthropic=req.path.startswith("/v1/messages"))
    resp.content_type = "application/json"
    if isinstance(problem, MethodNotAllowed):
        resp.set_header("Allow", ", ".join(problem.allowed))
    if isinstance(problem, Busy):
        resp.set_header("Retry-After", str(max(1, round(problem.retry_after_s))))
    if problem.status == 401:
        resp.set_header("WWW-Authenticate", 'Bearer realm="rbee"')
