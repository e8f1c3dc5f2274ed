"""The control of the fleet: what hives report here, and what the person asks of hives through the queen."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import falcon
import gevent
import msgspec

from rbee import __version__
from rbee.errors import OldReport, RbeeError
from rbee.queen import body
from rbee.queen.access import OPERATOR
from rbee.queen.peers import TOKEN_OF
from rbee.queen.watched import HiveState
from rbee.wire.fleet import (
    AddModel,
    HiveReport,
    ModelReport,
    Problem,
    ProcessView,
    QueenStatus,
    SpawnWorker,
    WorkerReport,
)
from rbee.wire.openai import parse

if TYPE_CHECKING:
    from rbee.queen.app import Queen

log = logging.getLogger("rbee.queen")

CALL_TIMEOUT_S = 30.0
REPORT, WORKER_REPORT = msgspec.json.Decoder(HiveReport), msgspec.json.Decoder(WorkerReport)


class Resource:
    """What the resources below share."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen


class Status(Resource):
    """Everything there is to know about this queen."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._queen.access.operator(req.env)
        resp.data = msgspec.json.encode(status(self._queen))


def status(queen: Queen) -> QueenStatus:
    """Return the queen's state as it may be shown to its operator."""
    queen.script.follow()
    processes, missing = together(queen)
    return QueenStatus(
        version=__version__,
        pid=queen.master_pid,
        url=f"http://{queen.settings.host}:{queen.settings.port}",
        started_at=queen.started_at,
        draining=queen.draining_since() is not None,
        in_flight=sum(one.in_flight for one in processes) if processes else queen.admission.in_flight,
        scheduler=queen.script.source,
        scheduler_error=queen.script.error,
        hives=queen.fleet.views(),
        problems=[*problems(queen), *(Problem(where=name, message="It does not answer") for name in missing)],
        processes=processes,
        shared_state=queen.sharing.shown() if queen.sharing else None,
    )


def together(queen: Queen) -> tuple[list[ProcessView], list[str]]:
    """Return the server processes of this queen, and the names of those that do not answer; none where she is alone."""
    if queen.sharing is None:
        return [], []
    peers = queen.sharing.peers
    answers, missing = peers.gather(peers.siblings(), "/v1/orchestrator/process", OPERATOR)
    others = [msgspec.json.decode(data, type=ProcessView) for data in answers.values()]
    return sorted([process(queen), *others], key=lambda one: one.slot), missing


def process(queen: Queen) -> ProcessView:
    """Return what this server process is doing."""
    return ProcessView(
        slot=queen.settings.slot,
        pid=os.getpid(),
        started_at=queen.started_at,
        in_flight=queen.admission.in_flight,
        waiting=sum(queen.admission.queues.counts().values()),
        state_reached=queen.sharing is not None and queen.sharing.link.up,
        queens=len(queen.sharing.shown().queens) if queen.sharing is not None else 0,
    )


def problems(queen: Queen) -> list[Problem]:
    """Return what a person should know about."""
    found = []
    if queen.sharing is not None and not queen.sharing.link.up:
        found.append(queen.sharing.lost())
    if queen.script.error:
        found.append(Problem(where="scheduler", message=queen.script.error))
    found += [msgspec.structs.replace(one, since=queen.inventory.since) for one in queen.inventory.mistakes]
    for view in queen.fleet.views():
        if view.state == HiveState.UNREACHABLE:
            found.append(Problem(where=view.hive, message=view.reason, since=view.since))
        elif view.state == "lost":
            found.append(Problem(where=view.hive, message="This hive does not report any more"))
    for _, hive in sorted(queen.fleet.hives.items()):
        for worker in hive.workers.values():
            if worker.report.reason:
                found.append(Problem(where=worker.id, message=worker.report.reason, since=worker.report.since))
    return found


class Process(Resource):
    """What this server process is doing, for another one."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        sharing = self._queen.sharing
        if sharing is None or not sharing.peers.trusts(req.env.get(TOKEN_OF, "")):
            self._queen.access.operator(req.env)
        resp.data = msgspec.json.encode(process(self._queen))


class Reports(Resource):
    """Where hives report."""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._queen.access.hive(req.env)
        data = body.read(req)
        if not self._queen.fleet.learn(parse(data, REPORT)):
            raise _old()
        tell_others(self._queen, req, data)
        resp.data = b"{}"


def tell_others(queen: Queen, req: falcon.Request, data: bytes) -> None:
    """Have the other server processes of this queen take a report that reached this one."""
    if queen.sharing is not None and TOKEN_OF not in req.env:
        hive = req.get_header("X-Rbee-Hive")
        queen.sharing.peers.tell(req.path, data, {"X-Rbee-Hive": hive} if hive else {})


def _old() -> OldReport:
    log.warning("a hive sent a report of an earlier run of it, which was not taken")
    return OldReport(
        "A later run of this hive or worker is known", hint="rbee stop, if this machine's clock was put back"
    )


class ReadyWorkers(Resource):
    """Where a hive tells of a worker that has become ready."""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._queen.access.hive(req.env)
        data = body.read(req)
        if not self._queen.fleet.learn_worker(req.get_header("X-Rbee-Hive") or "", parse(data, WORKER_REPORT)):
            raise _old()
        tell_others(self._queen, req, data)
        resp.data = b"{}"


class Shutdown(Resource):
    """Let the running jobs end, then end."""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._queen.access.operator(req.env)
        # An idle queen has nothing to wait for; gunicorn looks for the end of jobs once a second.
        in_flight = status(self._queen).in_flight
        ending = signal.SIGTERM if in_flight else signal.SIGQUIT
        # After this answer is out.
        gevent.spawn_later(0.05, os.kill, self._queen.master_pid, ending)
        resp.status = 202
        resp.data = msgspec.json.encode({"status": "draining", "in_flight": in_flight})


class Hives(Resource):
    """Every hive that reported, and every host of the inventory."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._queen.access.operator(req.env)
        resp.data = msgspec.json.encode(self._queen.fleet.views())


class HiveCall(Resource):
    """A call that the queen passes on to a hive, after which it asks for the hive's state."""

    def _call(self, req: falcon.Request, hive: str, method: str, path: str, value: Any, type_: type[Any]) -> Any:
        self._queen.access.operator(req.env)
        client = self._queen.fleet.hive(hive).client
        try:
            answer = client.send(method, path, value, timeout_s=CALL_TIMEOUT_S)
            return msgspec.json.decode(answer.read(timeout_s=CALL_TIMEOUT_S), type=type_)
        finally:
            self._look(hive)

    def _look(self, name: str) -> None:
        with contextlib.suppress(RbeeError):  # the call's own error says more
            self._queen.fleet.look(name)


class Workers(HiveCall):
    """The workers of one hive."""

    def on_post(self, req: falcon.Request, resp: falcon.Response, hive: str) -> None:
        self._queen.access.operator(req.env)
        wanted = body.read_json(req, SpawnWorker)
        report = self._call(req, hive, "POST", "/v1/workers", wanted, WorkerReport)
        resp.status = 202
        resp.data = msgspec.json.encode(msgspec.structs.replace(report, access=None))


class Worker(HiveCall):
    """One worker."""

    def on_delete(self, req: falcon.Request, resp: falcon.Response, hive: str, name: str) -> None:
        report = self._call(req, hive, "DELETE", f"/v1/workers/{quote(name, safe='')}", None, WorkerReport)
        resp.data = msgspec.json.encode(msgspec.structs.replace(report, access=None))


class WorkerLog(HiveCall):
    """The last lines that a worker wrote."""

    def on_get(self, req: falcon.Request, resp: falcon.Response, hive: str, name: str) -> None:
        self._queen.access.operator(req.env)
        lines = req.get_param_as_int("lines", min_value=1, max_value=10_000, default=100)
        client = self._queen.fleet.hive(hive).client
        answer = client.send("GET", f"/v1/workers/{quote(name, safe='')}/log?lines={lines}", timeout_s=CALL_TIMEOUT_S)
        resp.content_type = "text/plain; charset=utf-8"
        resp.data = answer.read(timeout_s=CALL_TIMEOUT_S)


class HiveModels(HiveCall):
    """The model files of one hive."""

    def on_post(self, req: falcon.Request, resp: falcon.Response, hive: str) -> None:
        self._queen.access.operator(req.env)
        wanted = body.read_json(req, AddModel)
        resp.status = 201
        resp.data = msgspec.json.encode(self._call(req, hive, "POST", "/v1/models", wanted, ModelReport))


class HiveModel(HiveCall):
    """One model file."""

    def on_delete(self, req: falcon.Request, resp: falcon.Response, hive: str, name: str) -> None:
        report = self._call(req, hive, "DELETE", f"/v1/models/{quote(name, safe='')}", None, ModelReport)
        resp.data = msgspec.json.encode(report)
