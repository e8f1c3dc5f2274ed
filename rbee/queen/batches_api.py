"""`/v1/batches`, as OpenAI has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import falcon
import msgspec

from rbee.queen import body
from rbee.queen.job_rows import scope_of
from rbee.queen.jobs_api import limit_of, wishes_of
from rbee.queen.openai import request_timeout
from rbee.queen.passing import CONTROL_TIMEOUT_S, elsewhere, pass_on
from rbee.wire.jobs import CreateBatch
from rbee.wire.openai import parse

if TYPE_CHECKING:
    from rbee.queen.app import Queen


DECODER = msgspec.json.Decoder(CreateBatch)


class Batches:
    """All batches of the caller."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        caller = self._queen.access.caller(req.env)
        data = body.read(req)
        wanted = parse(data, DECODER)
        # A batch is where its file is.
        route = elsewhere(self._queen, req, wanted.input_file_id)
        if route is not None:
            pass_on(req, resp, route, caller, timeout_s=CONTROL_TIMEOUT_S, data=data)
            return
        wishes, timeout_s = wishes_of(req), request_timeout(req)
        made = self._queen.batches.create(caller, wanted, scope_of(caller), wishes=wishes, timeout_s=timeout_s)
        resp.data = msgspec.json.encode(made)

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
