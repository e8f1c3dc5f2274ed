"""`/v1/batches`, as OpenAI has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import falcon
import msgspec

from rbee.queen import body
from rbee.queen.job_rows import scope_of
from rbee.queen.jobs_api import limit_of
from rbee.wire.jobs import CreateBatch

if TYPE_CHECKING:
    from rbee.queen.app import Queen


class Batches:
    """All batches of the caller."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        caller = self._queen.access.caller(req.env)
        wanted = body.read_json(req, CreateBatch)
        resp.data = msgspec.json.encode(self._queen.batches.create(caller, wanted, scope_of(caller)))

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        scope = scope_of(self._queen.access.caller(req.env))
        page = self._queen.batches.page(scope, after=req.get_param("after"), limit=limit_of(req))
        resp.data = msgspec.json.encode(page)


class Batch:
    """One batch."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response, batch_id: str) -> None:
        scope = scope_of(self._queen.access.caller(req.env))
        resp.data = msgspec.json.encode(self._queen.batches.get(batch_id, scope))


class BatchCancel:
    """The end of a batch before its time."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_post(self, req: falcon.Request, resp: falcon.Response, batch_id: str) -> None:
        scope = scope_of(self._queen.access.caller(req.env))
        resp.data = msgspec.json.encode(self._queen.batches.cancel(batch_id, scope))
