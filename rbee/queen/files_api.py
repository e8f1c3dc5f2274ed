"""`/v1/files`, as OpenAI has it: a multipart body goes to the disk as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import falcon
import msgspec
from falcon.media.multipart import BodyPart, MultipartFormHandler, MultipartParseError

from rbee.errors import InvalidRequest, PayloadTooLarge
from rbee.queen.body import Paced
from rbee.queen.files import MAX_FILE_BYTES, PIECE_BYTES
from rbee.queen.job_rows import scope_of
from rbee.queen.jobs_api import limit_of
from rbee.queen.ledger import owner_of
from rbee.wire.jobs import FileDeleted, FileObject

if TYPE_CHECKING:
    from rbee.queen.app import Queen

PURPOSE = "batch"
MAX_FORM_BYTES = MAX_FILE_BYTES + 65536
MAX_LIMIT = 10_000
HINT = "multipart/form-data with purpose=batch and file=@requests.jsonl"


class Files:
    """All files of the caller."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen
        self._form = MultipartFormHandler()
        self._form.parse_options.max_body_part_count = 16

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        caller = self._queen.access.caller(req.env)
        if not (req.content_type or "").startswith("multipart/form-data"):
            raise InvalidRequest("A file is sent as multipart/form-data", hint=HINT)
        if (req.content_length or 0) > MAX_FORM_BYTES:
            raise PayloadTooLarge(MAX_FILE_BYTES)
        self._queen.records.check()
        try:
            stored = self._store(req, owner_of(caller))
        except (MultipartParseError, falcon.HTTPInvalidHeader, UnicodeDecodeError) as problem:
            raise InvalidRequest(f"The form cannot be read ({problem})", hint=HINT) from None
        resp.data = msgspec.json.encode(stored)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        scope = scope_of(self._queen.access.caller(req.env))
        limit = limit_of(req, default=MAX_LIMIT, most=MAX_LIMIT)
        files = self._queen.files.list(
            scope, purpose=req.get_param("purpose"), after=req.get_param("after"), limit=limit
        )
        resp.data = msgspec.json.encode(files)

    def _store(self, req: falcon.Request, owner: str) -> FileObject:
        """Read the form's parts in the order in which they come; the purpose may stand before or after the file."""
        purpose: str | None = None
        stored: FileObject | None = None
        try:
            for part in self._form.deserialize(Paced(req), req.content_type, req.content_length):
                if part.name == "purpose":
                    purpose = part.get_text()
                    _check_purpose(purpose)
                elif part.name == "file" and stored is None:
                    name = (part.filename or "file")[:255]
                    stored = self._queen.files.write(_pieces(part), owner=owner, filename=name, purpose=PURPOSE)
            if stored is None:
                raise InvalidRequest("The form has no file", hint=HINT, param="file")
            _check_purpose(purpose)
        except BaseException:
            if stored is not None:
                self._queen.files.delete(stored.id, owner)
            raise
        return stored


class File:
    """One file's facts."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response, file_id: str) -> None:
        scope = scope_of(self._queen.access.caller(req.env))
        resp.data = msgspec.json.encode(self._queen.files.get(file_id, scope))

    def on_delete(self, req: falcon.Request, resp: falcon.Response, file_id: str) -> None:
        scope = scope_of(self._queen.access.caller(req.env))
        self._queen.files.delete(file_id, scope)
        resp.data = msgspec.json.encode(FileDeleted(id=file_id))


class FileContent:
    """One file's bytes."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response, file_id: str) -> None:
        scope = scope_of(self._queen.access.caller(req.env))
        file = self._queen.files.get(file_id, scope)
        resp.content_type = "application/octet-stream"
        resp.content_length = file.bytes
        resp.stream = self._queen.files.content(file.id)


def _pieces(part: BodyPart) -> Iterator[bytes]:
    while data := part.stream.read(PIECE_BYTES):
        yield data


def _check_purpose(purpose: str | None) -> None:
    if purpose != PURPOSE:
        shown = "missing" if purpose is None else repr(purpose[:40])
        raise InvalidRequest(f"The purpose is {shown}; files are kept for 'batch'", hint=HINT, param="purpose")
