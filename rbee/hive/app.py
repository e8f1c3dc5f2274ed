"""The routes of a hive."""

from __future__ import annotations

from rbee.errors import InvalidRequest
from rbee.hive.service import ENGINES_WAIT_S, Hive
from rbee.hive.watch import LONGEST_WAIT_S, After
from rbee.http.server import Handler, Request, Response, Routes, reply
from rbee.wire.fleet import AddModel, SpawnWorker, WorkerReady

STOP_WAIT_S = 25.0
MAX_LOG_LINES = 10_000


def routes(hive: Hive) -> Routes:
    """Return every route; each but two needs the hive's token, and a worker's news needs that worker's."""
    table = Routes()
    table.add("GET", "/health", lambda request: reply(hive.health()))
    table.add("POST", "/v1/workers/ready", _worker_ready(hive))

    def guarded(method: str, path: str, handler: Handler) -> None:
        def checked(request: Request) -> Response:
            request.require(hive.token)
            return handler(request)

        table.add(method, path, checked)

    guarded("GET", "/v1/hive", lambda request: reply(hive.report()))
    guarded("GET", "/v1/hive/watch", lambda request: _watch(hive, request))
    guarded("GET", "/v1/workers", lambda request: reply(hive.worker_reports()))
    guarded("POST", "/v1/workers", lambda request: reply(hive.spawn(request.json(SpawnWorker)), 202))
    guarded("DELETE", "/v1/workers/{name}", lambda request: _stop(hive, request))
    guarded("GET", "/v1/workers/{name}/log", lambda request: _log(hive, request))
    guarded("GET", "/v1/models", lambda request: reply(hive.models(wait_s=ENGINES_WAIT_S)))
    guarded("POST", "/v1/models", lambda request: reply(hive.add_model(request.json(AddModel)), 201))
    guarded("DELETE", "/v1/models/{name}", lambda request: reply(hive.remove_model(request.params["name"])))
    return table


def _worker_ready(hive: Hive) -> Handler:
    def handler(request: Request) -> Response:
        hive.workers.announce(request.json(WorkerReady), request.require)
        return reply({})

    return handler


def _watch(hive: Hive, request: Request) -> Response:
    after = After.parse(request.query.get("after", [""])[0])
    wait_s = _number(request, "wait", LONGEST_WAIT_S, LONGEST_WAIT_S)
    return reply(hive.watch(after, wait_s, request.gone))


def _log(hive: Hive, request: Request) -> Response:
    lines = _number(request, "lines", 100, MAX_LOG_LINES)
    text = hive.log_tail(request.params["name"], int(lines))
    return Response(text.encode(), content_type="text/plain; charset=utf-8")


def _stop(hive: Hive, request: Request) -> Response:
    wait_s = _number(request, "wait", STOP_WAIT_S, STOP_WAIT_S)
    return reply(hive.stop_worker(request.params["name"], wait_s))


def _number(request: Request, name: str, default: float, most: float) -> float:
    """Return a number of the query between 0 and `most`. Raises: InvalidRequest."""
    text = request.query.get(name, [""])[0]
    try:
        number = float(text) if text else default
    except ValueError:
        number = -1.0
    if not 0 <= number <= most:
        raise InvalidRequest(f"{name} must be a number from 0 to {most:g}", param=name)
    return number
