"""The public endpoints: inference, models, health, metrics and the schema of it all."""

from __future__ import annotations

import difflib
import os
import re
from typing import TYPE_CHECKING

import falcon
import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from rbee import __version__
from rbee.errors import InvalidRequest, UnknownModel
from rbee.queen import body
from rbee.queen.client_watch import ClientWatch
from rbee.queen.job import Job
from rbee.queen.openapi import document
from rbee.wire.fleet import NAME_PATTERN, ModelReport
from rbee.wire.openai import ModelCard, ModelList, decode

if TYPE_CHECKING:
    from rbee.queen.app import Queen

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
        client = ClientWatch(req.env.get("gunicorn.socket"))
        job = Job(self._path, request, data, caller, client, wish)
        resp.set_header("X-Rbee-Job", job.id)
        try:
            reply = self._queen.jobs.run(job)
        except BaseException:
            client.close()
            raise
        resp.status = reply.status
        resp.content_type = reply.content_type
        resp.set_header("X-Rbee-Worker", job.worker_id)
        if isinstance(reply.body, bytes):
            resp.data = reply.body
        else:
            resp.set_headers(STREAM_HEADERS)
            resp.stream = reply.body


def hive_wish(req: falcon.Request) -> str | None:
    """Return the hive that the client asks for, if any. Raises: InvalidRequest."""
    wish = req.get_header("X-Rbee-Hive")
    if wish is not None and not re.fullmatch(NAME_PATTERN, wish):
        raise InvalidRequest("The header X-Rbee-Hive does not hold a hive's name", param="X-Rbee-Hive")
    return wish


class Models:
    """Every model that some hive has."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._queen.access.caller(req.env)
        cards = [card(self._queen, model) for _, model in sorted(self._queen.fleet.models().items())]
        resp.data = msgspec.json.encode(ModelList(data=cards))


class Model:
    """One model."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        self._queen.access.caller(req.env)
        models = self._queen.fleet.models()
        if name not in models:
            raise UnknownModel(name, difflib.get_close_matches(name, models, n=3, cutoff=0.5), sorted(models))
        resp.data = msgspec.json.encode(card(self._queen, models[name]))


def card(queen: Queen, model: ModelReport) -> ModelCard:
    """Return what a client may know of a model."""
    hives = [name for name, hive in queen.fleet.hives.items() if any(m.name == model.name for m in hive.report.models)]
    loaded = [
        worker.id
        for hive in queen.fleet.hives.values()
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
        resp.data = msgspec.json.encode(
            {"status": "draining" if draining else "ok", "version": __version__, "pid": os.getppid()}
        )


class MetricsPage:
    """Prometheus' page."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._queen.access.caller(req.env)
        resp.content_type = CONTENT_TYPE_LATEST.partition(";")[0] + "; version=0.0.4; charset=utf-8"
        resp.data = self._queen.metrics.render()


class Schema:
    """The OpenAPI document."""

    def __init__(self, queen: Queen) -> None:
        self._document: bytes | None = None

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._document = self._document or msgspec.json.encode(document())
        resp.data = self._document
