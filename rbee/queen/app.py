"""The queen's web application: its parts are put together and its routes stand on one page."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import falcon
import gevent
from falcon.routing import CompiledRouter

from rbee import logs, paths
from rbee.errors import Busy, MethodNotAllowed, NotFound, RbeeError
from rbee.logs import clip
from rbee.queen import batches_api, files_api, gauges, gitops, jobs_api, load_api, openai, orchestrator, scheduler
from rbee.queen.access import Access
from rbee.queen.admission import Admission
from rbee.queen.background import Background
from rbee.queen.batches import Batches
from rbee.queen.capacity import Capacity
from rbee.queen.client_watch import ClientGone
from rbee.queen.decisions import DecisionLog
from rbee.queen.dispatch import Dispatch
from rbee.queen.draining import end_in_time
from rbee.queen.files import FileStore
from rbee.queen.fleet import Fleet
from rbee.queen.gitops import Gitops
from rbee.queen.idempotency import Idempotency
from rbee.queen.inventory import FollowedInventory
from rbee.queen.job_log import log_job
from rbee.queen.jobs import Jobs
from rbee.queen.jwt_tokens import JwtTokens, read_jwt_settings
from rbee.queen.keys import KeyStore
from rbee.queen.limits import Limits
from rbee.queen.loads import Loads, alone
from rbee.queen.log_sources import log_greenlets
from rbee.queen.loop_guard import LoopGuard
from rbee.queen.loop_lag import LoopLag
from rbee.queen.metrics import Metrics
from rbee.queen.passing import passed
from rbee.queen.peers import SharedAccess
from rbee.queen.rates import Rates
from rbee.queen.records import Records
from rbee.queen.relay import Relay
from rbee.queen.remote import Servers
from rbee.queen.routing import Routing
from rbee.queen.script import RoutingScript
from rbee.queen.settings import Settings
from rbee.queen.waiting import Patience
from rbee.queen.watching import CONNECTING_AT_ONCE, Watching
from rbee.wire.errors import encode_error
from rbee.wire.jobs import BatchList, FileList, JobList
from rbee.wire.openai import REQUESTS

if TYPE_CHECKING:
    from rbee.queen.shared import Shared

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
    rates: Rates
    loop_lag: LoopLag
    loop_guard: LoopGuard
    inventory: FollowedInventory
    gitops: Gitops
    sharing: Shared | None
    draining_since: Callable[[], float | None]
    started_at: float
    master_pid: int


def create_queen(settings: Settings, *, draining_since: Callable[[], float | None] = lambda: None) -> Queen:
    """Make the parts and introduce them to each other."""
    fleet = Fleet(settings.fleet_path, settings.hive_token, expects_hive=settings.run_hive)
    sharing = _shared(settings, fleet)
    metrics = Metrics(fleet)
    script = RoutingScript(settings.script_path, settings.script_memory)
    script.reload()
    decisions = DecisionLog(settings.decisions_path)
    routing = Routing(fleet, script, choice_timeout_s=settings.choice_timeout_s, decisions=decisions)
    limits = sharing.limits if sharing else Limits(settings.limits_path)
    admission = Admission(
        settings.max_in_flight,
        script,
        metrics,
        sharing.capacity if sharing else Capacity(fleet),
        limits=limits,
        queue_limit=settings.queue_limit,
        queue_timeout_s=settings.queue_timeout_s,
        starvation_s=settings.starvation_s,
    )
    records = Records(settings.records_dir, settings.retention, settings.orphaned_records)
    loads = Loads(fleet, timeout_s=settings.load_timeout_s, starting=sharing.starting if sharing else alone)
    jobs = Jobs(
        admission,
        routing,
        Dispatch(
            fleet,
            loads,
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
    if settings.log_jobs:
        jobs.observers.append(log_job)
    if settings.traced:
        from rbee.queen.tracing import Tracing  # what it imports is large

        jobs.tracing = Tracing(settings.otlp_endpoint)
        jobs.observers.append(jobs.tracing.ended)
        metrics.show(jobs.tracing.dropped)
    inventory = FollowedInventory(
        settings.inventory_dir, settings.identity_dir, settings.inventory_memory, optional=not settings.declared
    )
    reconciler = Gitops(settings.gitops)
    loop_lag, loop_guard = LoopLag(), LoopGuard()
    metrics.show(
        gauges.QueueGauges(admission.queues, fleet),
        gauges.ScriptGauges(script),
        script.times,
        loads.times,
        gauges.RecordsGauges(records),
        gauges.LoopGauges(loop_lag),
        loop_lag.lags,
        loop_guard,
        gauges.InventoryGauges(inventory),
        gauges.GitopsGauges(reconciler),
    )
    issuer = read_jwt_settings(settings.jwt_path)
    tokens = JwtTokens(issuer) if issuer else None
    access = (SharedAccess if sharing else Access)(settings, KeyStore(settings.keys_path), tokens)
    files = FileStore(settings.records_dir / "files", records)
    background = Background(jobs, records, files, draining_since=draining_since)
    batches = Batches(records, files, background)
    if sharing is not None and isinstance(access, SharedAccess):
        access.peers = sharing.peers
        sharing.share(admission.queues)
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
        rates=Rates(lambda: load_api.counts(fleet, metrics.totals)),
        loop_lag=loop_lag,
        loop_guard=loop_guard,
        inventory=inventory,
        gitops=reconciler,
        sharing=sharing,
        draining_since=draining_since,
        started_at=time.time(),
        master_pid=os.getppid(),
    )


def _shared(settings: Settings, fleet: Fleet) -> Shared | None:
    """Return the part that shares with others, where there are any. What it needs is imported only then."""
    if not settings.shared:
        return None
    from rbee.queen.shared import Shared

    return Shared(settings, fleet)


def follow_fleet(queen: Queen) -> None:
    """Take up the hives that are known, and begin to follow the inventory and its hives."""
    watching, servers = Watching(queen.fleet), Servers(queen.fleet)

    def watch() -> None:
        # A host with `HivePort none` runs no hive.
        hosts = {host.name: host for host in queen.inventory.hosts if host.hive_port}
        watching.follow(hosts, queen.inventory.identity)
        servers.follow(queen.inventory.hosts)

    gevent.get_hub().threadpool.maxsize = 2 * CONNECTING_AT_ONCE
    if queen.sharing is not None:
        queen.sharing.start()
    queen.loop_lag.start()
    logs.follow(queen.jobs.live)
    log_greenlets()
    queen.loop_guard.start()
    gevent.spawn(queen.fleet.recall)
    queen.inventory.look(first=True)
    watch()
    gevent.spawn(queen.inventory.run, watch)
    gevent.spawn(queen.admission.limits.keep)
    gevent.spawn(queen.decisions.run)
    gevent.spawn(end_in_time, queen.jobs.live, queen.draining_since, queen.settings.drain_s)
    gevent.spawn(queen.rates.run)
    if queen.jobs.tracing is not None:
        gevent.spawn(queen.jobs.tracing.run)
    queen.background.start(queen.batches)


def create_app(queen: Queen) -> falcon.App[falcon.Request, falcon.Response]:
    """Return the WSGI application."""
    app = falcon.App(router=Router())
    app.add_error_handler(Exception, _unexpected)
    app.add_error_handler(falcon.HTTPError, _refused_by_falcon(queen))
    app.add_error_handler(RbeeError, _refused(queen))
    app.add_error_handler(ClientGone, _nobody_waits)

    for path in REQUESTS:
        app.add_route(path, passed(queen, openai.Inference(queen, path), once=True))
    app.add_route("/v1/jobs", passed(queen, jobs_api.Jobs(queen), merged=JobList, once=True))
    app.add_route("/v1/jobs/{job_id}", passed(queen, jobs_api.Job(queen)))
    app.add_route("/v1/jobs/{job_id}/stream", passed(queen, jobs_api.JobStream(queen)))
    app.add_route("/v2/tasks", passed(queen, jobs_api.Tasks(queen), once=True))
    app.add_route("/v1/files", passed(queen, files_api.Files(queen), merged=FileList))
    app.add_route("/v1/files/{file_id}", passed(queen, files_api.File(queen)))
    app.add_route("/v1/files/{file_id}/content", passed(queen, files_api.FileContent(queen)))
    app.add_route("/v1/batches", passed(queen, batches_api.Batches(queen), merged=BatchList))
    app.add_route("/v1/batches/{batch_id}", passed(queen, batches_api.Batch(queen)))
    app.add_route("/v1/batches/{batch_id}/cancel", passed(queen, batches_api.BatchCancel(queen)))
    app.add_route("/v1/models", openai.Models(queen))
    app.add_route("/v1/models/{name}", openai.Model(queen))
    app.add_route("/health", openai.Health(queen))
    app.add_route("/metrics", _metrics(queen))
    app.add_route("/openapi.json", openai.Schema(queen))

    app.add_route("/gitops/status", gitops.Status(queen))
    app.add_route("/gitops/sync", gitops.Sync(queen))

    app.add_route("/v1/orchestrator/status", orchestrator.Status(queen))
    app.add_route("/v1/orchestrator/process", orchestrator.Process(queen))
    app.add_route("/v1/orchestrator/load", load_api.Load(queen))
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


def _metrics(queen: Queen) -> object:
    if queen.sharing is None:
        return openai.MetricsPage(queen)
    from rbee.queen.merged_metrics import MergedMetricsPage, SharedGauges

    queen.metrics.show(SharedGauges(queen.sharing))
    return MergedMetricsPage(queen, queen.sharing, paths.runtime_dir())


ErrorHandler = Callable[[falcon.Request, falcon.Response, BaseException, dict[str, object]], None]


def _refused(queen: Queen) -> ErrorHandler:
    def handle(req: falcon.Request, resp: falcon.Response, problem: BaseException, params: dict[str, object]) -> None:
        assert isinstance(problem, RbeeError)
        queen.metrics.refused(problem)
        _answer(req, resp, problem)

    return handle


def _refused_by_falcon(queen: Queen) -> ErrorHandler:
    """Put what Falcon itself refuses (an unknown path, a wrong method) into OpenAI's form."""

    def handle(req: falcon.Request, resp: falcon.Response, problem: BaseException, params: dict[str, object]) -> None:
        assert isinstance(problem, falcon.HTTPError)
        if isinstance(problem, falcon.HTTPMethodNotAllowed):
            _answer(req, resp, _wrong_method(queen, req, dict(problem.headers or {})["Allow"].split(", ")))
        elif isinstance(problem, falcon.HTTPNotFound):
            _answer(req, resp, NotFound(f"There is nothing at {req.path[:200]}", hint="the paths in /openapi.json"))
        else:
            error = RbeeError(problem.description or problem.title or "The request was refused")
            error.status, error.type, error.code = problem.status_code, "invalid_request_error", "invalid_request"  # type: ignore[misc]
            _answer(req, resp, error)

    return handle


def _wrong_method(queen: Queen, req: falcon.Request, allowed: list[str]) -> RbeeError:
    """Return the refusal of a method; whoever has no key is told no more than at any other."""
    try:
        queen.access.anyone(req.env)
    except RbeeError as problem:
        return problem
    return MethodNotAllowed(req.method, req.path, allowed)


class Router(CompiledRouter):
    """Falcon's router, to which OPTIONS is a method that no resource takes."""

    def map_http_methods(self, resource: object, **kwargs: Any) -> dict[str, Any]:
        """Return a resource's methods."""
        methods = dict[str, Any](super().map_http_methods(resource, **kwargs))
        allowed = sorted(methods)

        def refuse(req: falcon.Request, resp: falcon.Response, **params: object) -> NoReturn:
            raise falcon.HTTPMethodNotAllowed(allowed)

        return {"OPTIONS": refuse, **methods}


def _unexpected(req: falcon.Request, resp: falcon.Response, problem: BaseException, params: dict[str, object]) -> None:
    extra = {"job": resp.get_header("X-Rbee-Job")}
    log.error("%s %s failed", clip(req.method), clip(req.path), exc_info=problem, extra=extra)
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
