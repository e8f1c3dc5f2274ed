"""The public endpoints: inference, models, health, metrics and the schema of it all."""

from __future__ import annotations

import difflib
import math
import os
import re
from typing import TYPE_CHECKING

import falcon
import msgspec

from rbee import __version__
from rbee.errors import InvalidRequest, UnknownModel
from rbee.logs import serving
from rbee.queen import body
from rbee.queen.access import Caller
from rbee.queen.client_watch import ClientWatch
from rbee.queen.job import Job, Reply
from rbee.queen.ledger import owner_of
from rbee.queen.metrics_page import CONTENT_TYPE, metrics_page
from rbee.queen.openapi import document
from rbee.queen.policy import MEANT, Priority
from rbee.wire.fleet import NAME_PATTERN, ModelReport
from rbee.wire.openai import InferenceRequest, ModelCard, ModelList, decode

if TYPE_CHECKING:
    from rbee.queen.app import Queen

MAX_REQUEST_TIMEOUT_S = 86_400.0
STREAM_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
"""What keeps proxies from holding a stream back."""


class Inference:
    """One inference endpoint."""

    def __init__(self, queen: Queen, path: str) -> None:
        self._queen = queen
        self._path = path

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        caller = self._queen.access.caller(req.env)
        data = body.read(req)
        request = decode(self._path, data)
        wish = hive_wish(req)
        priority, said = job_priority(req, request, caller)
        region, tags = region_wish(req), job_tags(req)
        client = ClientWatch(req.env.get("gunicorn.socket"), request_timeout(req))
        job = Job(self._path, request, data, caller, client, wish, priority)
        job.region, job.tags, job.said = region, tags, said
        answer(self._queen, req, resp, job)


def answer(queen: Queen, req: falcon.Request, resp: falcon.Response, job: Job) -> None:
    """Run a job whose client waits, and put its reply into the response. Raises: whatever the job ends with."""
    caller, key = job.caller, req.env.get("HTTP_IDEMPOTENCY_KEY")
    resp.set_header("X-Rbee-Job", job.id)
    if queen.jobs.tracing is not None:
        queen.jobs.tracing.begin(job, req.env)
    try:
        reply = queen.patience.reply(job, queen.jobs.run) if key is None else once(queen, job, key)
    except BaseException:
        job.client.close()
        raise
    finally:
        tell_limits(queen, resp, caller)
    resp.status = reply.status
    resp.content_type = reply.content_type
    resp.set_header("X-Rbee-Job", job.id)
    resp.set_header("X-Rbee-Worker", job.worker_id)
    if isinstance(reply.body, bytes):
        resp.data = reply.body
    else:
        serving(job.id)  # the body is passed on by this greenlet, and made ready by another
        resp.set_headers(STREAM_HEADERS)
        resp.stream = reply.body


def tell_limits(queen: Queen, resp: falcon.Response, caller: Caller) -> None:
    """Put what is left of a key's rates into the headers, also of an answer that refuses."""
    if caller.policy.limited:
        resp.set_headers(queen.admission.limits.headers(caller.id, caller.policy))


def once(queen: Queen, job: Job, key: str) -> Reply:
    """Run a job unless its Idempotency-Key was answered before. Raises: KeyReused, and what the job ends with."""
    return queen.idempotency.reply(
        owner_of(job.caller), key, job, lambda first: queen.patience.reply(first, queen.jobs.run)
    )


def hive_wish(req: falcon.Request) -> str | None:
    """Return the hive that the client asks for, if any. Raises: InvalidRequest."""
    wish = req.get_header("X-Rbee-Hive")
    if wish is not None and not re.fullmatch(NAME_PATTERN, wish):
        raise InvalidRequest("The header X-Rbee-Hive does not hold a hive's name", param="X-Rbee-Hive")
    return wish


def request_timeout(req: falcon.Request) -> float | None:
    """Return the seconds that the client allows for its whole answer, if it says. Raises: InvalidRequest."""
    told = req.get_header("X-Request-Timeout")
    if told is None:
        return None
    try:
        seconds = float(told)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_REQUEST_TIMEOUT_S:
        raise InvalidRequest(
            f"The header X-Request-Timeout must be seconds, more than 0 and at most {MAX_REQUEST_TIMEOUT_S:g}",
            param="X-Request-Timeout",
        )
    return seconds


def job_priority(req: falcon.Request, request: InferenceRequest, caller: Caller) -> tuple[Priority, str]:
    """Return a job's priority: of its body, else of its header, else of its key, which it never exceeds.

    With it comes the client's word for it, as `Policy.heard` has it. Raises: InvalidRequest.
    """
    told = request.priority if isinstance(request.priority, str) else req.get_header("X-Rbee-Priority")
    if told is None:
        return caller.policy.priority, ""
    if told not in MEANT:
        raise InvalidRequest(f"The header X-Rbee-Priority must be one of {', '.join(MEANT)}", param="X-Rbee-Priority")
    return caller.policy.heard(told)


def region_wish(req: falcon.Request) -> str:
    """Return the region that a job must stay in, if the client names one. Raises: InvalidRequest."""
    wish = req.get_header("X-Rbee-Region") or ""
    if wish and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", wish):
        raise InvalidRequest("The header X-Rbee-Region does not hold a region's name", param="X-Rbee-Region")
    return wish


def job_tags(req: falcon.Request) -> tuple[str, ...]:
    """Return the words that the client gives the routing script, at most 16. Raises: InvalidRequest."""
    told = req.get_header("X-Rbee-Tags")
    if told is None:
        return ()
    tags = tuple(word.strip() for word in told.split(",") if word.strip())
    if len(tags) > 16 or any(len(tag) > 64 for tag in tags):
        raise InvalidRequest("The header X-Rbee-Tags takes at most 16 words of 64 characters", param="X-Rbee-Tags")
    return tags


class Models:
    """Every model that some hive has."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        policy = self._queen.access.caller(req.env).policy
        models = sorted(self._queen.fleet.models().items())
        cards = [card(self._queen, model) for name, model in models if policy.allows(name)]
        resp.data = msgspec.json.encode(ModelList(data=cards))


class Model:
    """One model."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        policy = self._queen.access.caller(req.env).policy
        models = {known: model for known, model in self._queen.fleet.models().items() if policy.allows(known)}
        if name not in models:
            raise UnknownModel(name, difflib.get_close_matches(name, models, n=3, cutoff=0.5), sorted(models))
        resp.data = msgspec.json.encode(card(self._queen, models[name]))


def card(queen: Queen, model: ModelReport) -> ModelCard:
    """Return what a client may know of a model."""
    there = [hive for hive in queen.fleet.hives.values() if not hive.away]
    having = [hive for hive in there if any(m.name == model.name for m in hive.report.models)]
    hives = sorted({hive.report.hive for hive in having})
    loaded = [
        worker.id
        for hive in there
        for worker in hive.workers.values()
        if worker.report.model == model.name and worker.ready
    ]
    return ModelCard(
        id=model.name,
        created=int(model.added_at),
        rbee={
            "hives": hives,
            "loaded": loaded,
            "capabilities": model.capabilities,
            "format": model.format,
            "size_bytes": model.size_bytes,
            "context_tokens": model.context_tokens,
            "quantization": model.quantization,
            "builtin": model.builtin,
            "problem": model.problem,
        },
    )


class Health:
    """Whether this process takes jobs."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        draining = self._queen.draining_since() is not None
        resp.status = 503 if draining else 200
        if draining:
            resp.set_header("Retry-After", "5")
        told = {"status": "draining" if draining else "ok", "version": __version__, "pid": os.getppid()}
        if self._queen.sharing is not None:
            told["shared_state"] = "reached" if self._queen.sharing.link.up else "away"
        resp.data = msgspec.json.encode(told)


class MetricsPage:
    """Prometheus' page: everything for the operator, its own series for a tenant."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        tenant = self._queen.access.reader(req.env).tenant
        resp.content_type = CONTENT_TYPE
        resp.data = metrics_page(self._queen.metrics, self._queen.admission.tenants, tenant)


class Schema:
    """The OpenAPI document."""

    def __init__(self, queen: Queen) -> None:
        self._document: bytes | None = None

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._document = self._document or msgspec.json.encode(document())
        resp.data = self._document
