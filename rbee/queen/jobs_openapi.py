"""The part of `/openapi.json` that tells of jobs, tasks, files and batches."""

from __future__ import annotations

from typing import Any, get_args

from rbee.wire.jobs import (
    Batch,
    BatchList,
    CreateBatch,
    FileDeleted,
    FileList,
    FileObject,
    JobCreated,
    JobList,
    JobStatus,
    JobView,
    TaskRequest,
)
from rbee.wire.openai import REQUESTS, PriorityWord

Json = dict[str, Any]

IDEMPOTENCY_KEY: Json = {"type": "string", "pattern": "^[ \\t]*[!-~]{1,255}[ \\t]*$"}
"""What surrounds a header's value is no part of it (RFC 9110, 5.5)."""

TYPES: list[type] = [
    JobCreated,
    JobView,
    JobList,
    TaskRequest,
    FileObject,
    FileList,
    FileDeleted,
    CreateBatch,
    Batch,
    BatchList,
]
SHORT_TEXT = {"type": "string", "maxLength": 512}
FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": "batch"}},
}
MANY = {"type": "integer", "minimum": 1, "maximum": 100}


def jobs_paths(refs: dict[type, Json], refusals: Json) -> Json:
    """Return the paths; `refs` are the schemas of the types, `refusals` the answers that every path may give."""

    def operation(summary: str, type_: type | None, status: str = "200", **more: Any) -> Json:
        schema = refs[type_] if type_ else {"type": "object"}
        answer: Json = {"description": "OK", "content": {"application/json": {"schema": schema}}}
        responses = {status: answer, **refusals}
        return {"summary": summary, "security": [{}, {"key": []}], "responses": responses, **more}

    def body(schema: Json, media: str = "application/json") -> Json:
        return {"required": True, "content": {media: {"schema": schema}}}

    job, file, batch = (_in("path", name, {"type": "string"}) for name in ("job_id", "file_id", "batch_id"))
    paged = [_in("query", "limit", MANY), _in("query", "after", {"type": "string"})]
    filters = [_in("query", "status", {"enum": list(JobStatus)}), _in("query", "model", {"type": "string"})]
    once = [_in("header", "Idempotency-Key", IDEMPOTENCY_KEY)]
    resume = [_in("header", "Last-Event-ID", {"type": "string"})]
    stream = operation("Follow a job's events", None, parameters=resume)
    stream["responses"]["200"]["content"] = {"text/event-stream": {}}
    content = operation("Read a file's bytes", None)
    content["responses"]["200"]["content"] = {"application/octet-stream": {"schema": {"type": "string"}}}
    task = operation("Answer one prompt", None, requestBody=body(refs[TaskRequest]))
    task["responses"]["200"]["content"]["text/event-stream"] = {}
    files = [
        _in("query", "limit", {"type": "integer", "minimum": 1, "maximum": 10_000}),
        paged[1],
        _in("query", "purpose", {"type": "string"}),
    ]
    return {
        "/v1/jobs": {
            "post": operation("Create a job", JobCreated, "202", requestBody=body(_job(refs)), parameters=once),
            "get": operation("List the jobs", JobList, parameters=[*paged, *filters]),
        },
        "/v1/jobs/{job_id}": {
            "parameters": [job],
            "get": operation("Tell what became of a job", JobView),
            "delete": operation("Cancel a job", JobView),
        },
        "/v1/jobs/{job_id}/stream": {"parameters": [job], "get": stream},
        "/v2/tasks": {"post": task},
        "/v1/files": {
            "post": operation("Store a file", FileObject, requestBody=body(FORM, "multipart/form-data")),
            "get": operation("List the files", FileList, parameters=files),
        },
        "/v1/files/{file_id}": {
            "parameters": [file],
            "get": operation("Describe a file", FileObject),
            "delete": operation("Remove a file", FileDeleted),
        },
        "/v1/files/{file_id}/content": {"parameters": [file], "get": content},
        "/v1/batches": {
            "post": operation("Create a batch", Batch, requestBody=body(refs[CreateBatch])),
            "get": operation("List the batches", BatchList, parameters=paged),
        },
        "/v1/batches/{batch_id}": {"parameters": [batch], "get": operation("Tell how far a batch is", Batch)},
        "/v1/batches/{batch_id}/cancel": {"parameters": [batch], "post": operation("Cancel a batch", Batch)},
    }


def _job(refs: dict[type, Json]) -> Json:
    """Return the schema of a job's request: its body is that of its endpoint."""
    metadata = {
        "type": "object",
        "maxProperties": 16,
        "propertyNames": {"maxLength": 64},
        "additionalProperties": SHORT_TEXT,
    }
    return {
        "oneOf": [
            {
                "type": "object",
                "required": ["endpoint", "body"],
                "additionalProperties": False,
                "properties": {
                    "endpoint": {"const": path},
                    "body": refs[request],
                    "metadata": metadata,
                    "priority": {"enum": list(get_args(PriorityWord))},
                },
            }
            for path, request in REQUESTS.items()
        ]
    }


def _in(place: str, name: str, schema: Json) -> Json:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}
