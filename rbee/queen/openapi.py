"""The OpenAPI 3.1 document of the queen's endpoints, made from the wire types."""

from __future__ import annotations

from typing import Any

import msgspec

from rbee import __version__
from rbee.queen import jobs_openapi
from rbee.wire.errors import ErrorBody
from rbee.wire.fleet import (
    NAME_PATTERN,
    AddModel,
    HiveReport,
    HiveView,
    ModelReport,
    QueenStatus,
    SpawnWorker,
    WorkerReport,
)
from rbee.wire.gitops import GitopsView
from rbee.wire.load import QueenLoad
from rbee.wire.openai import REQUESTS, InferenceRequest, ModelCard, ModelList

Json = dict[str, Any]

SUMMARIES = {
    "/v1/chat/completions": "Answer a chat",
    "/v1/completions": "Continue a text",
    "/v1/embeddings": "Turn texts into vectors",
    "/v1/rerank": "Order documents by their relevance to a query",
    "/v1/responses": "Answer in the form of the Responses API",
    "/v1/messages": "Answer in the form of Anthropic's Messages API",
    "/v1/messages/count_tokens": "Count the tokens of a conversation",
}
QUESTION = "How do I add a machine?"
TURNS = {"model": "rbee-demo", "messages": [{"role": "user", "content": QUESTION}]}
EXAMPLES: dict[str, Json] = {
    "/v1/chat/completions": TURNS,
    "/v1/completions": {"model": "rbee-demo", "prompt": "rbee is", "max_tokens": 32},
    "/v1/embeddings": {"model": "echo", "input": [QUESTION, "What is a hive?"]},
    "/v1/rerank": {"model": "echo", "query": "a machine", "documents": [QUESTION, "What is a hive?"]},
    "/v1/responses": {"model": "rbee-demo", "input": QUESTION},
    "/v1/messages": {**TURNS, "max_tokens": 256},
    "/v1/messages/count_tokens": TURNS,
}
STREAMS = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
REFUSALS = {
    "400": "A field is wrong; `param` names it",
    "401": "No key, or a wrong one",
    "403": "This key or origin may not do that",
    "404": "No such model or thing",
    "405": "The path does not take this method",
    "408": "The body did not arrive in time",
    "409": "The Idempotency-Key was used for another request",
    "413": "The body is over 4 MiB",
    "429": "The routing script turned the job away",
    "500": "An internal error",
    "501": "The engine does not have this",
    "502": "The worker was lost before it answered",
    "503": "No room at present; see Retry-After",
    "504": "The worker did not answer in time",
}
NAME = {"type": "string", "pattern": NAME_PATTERN}


def document() -> Json:
    """Return the document as plain JSON values."""
    types: list[type] = [
        *REQUESTS.values(),
        ErrorBody,
        ModelList,
        ModelCard,
        QueenStatus,
        QueenLoad,
        GitopsView,
        HiveView,
        HiveReport,
        WorkerReport,
    ]
    types += jobs_openapi.TYPES
    types += [SpawnWorker, AddModel, ModelReport]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    refs = dict(zip(types, schemas, strict=True))
    error = refs[ErrorBody]
    paths: Json = {path: {"post": _inference(path, type_, refs, error)} for path, type_ in REQUESTS.items()}
    paths |= jobs_openapi.jobs_paths(refs, _refusals(error))
    paths |= _reads(refs, error) | _control(refs, error)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "rbee",
            "version": __version__,
            "description": "One OpenAI-compatible service from the machines that you own.",
            "license": {"name": "GPL-3.0-or-later", "identifier": "GPL-3.0-or-later"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "operator": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _inference(path: str, type_: type[InferenceRequest], refs: dict[type, Json], error: Json) -> Json:
    content: Json = {"application/json": {"schema": {"type": "object"}}}
    if path in STREAMS:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    media: Json = {"schema": refs[type_], "example": EXAMPLES[path]}
    return {
        "summary": SUMMARIES[path],
        "operationId": path.removeprefix("/v1/").replace("/", "_"),
        "security": [{}, {"key": []}],
        "parameters": [
            {
                "name": "X-Rbee-Hive",
                "in": "header",
                "required": False,
                "description": "Run the job on this hive and on no other",
                "schema": NAME,
            },
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "description": "The same request with the same key has one execution and one answer, for 24 hours",
                "schema": jobs_openapi.IDEMPOTENCY_KEY,
            },
        ],
        "requestBody": {"required": True, "content": {"application/json": media}},
        "responses": {"200": {"description": "The answer", "content": content}, **_refusals(error)},
    }


def _reads(refs: dict[type, Json], error: Json) -> Json:
    text = {"text/plain": {"schema": {"type": "string"}}}
    health = {"schema": {"type": "object", "required": ["status", "version", "pid"]}}
    return {
        "/v1/models": {"get": _get("List the models", {"application/json": {"schema": refs[ModelList]}}, error)},
        "/v1/models/{name}": {
            "parameters": [{**_parameter("name"), "example": "rbee-demo"}],
            "get": _get("Describe a model", {"application/json": {"schema": refs[ModelCard]}}, error),
        },
        "/metrics": {"get": _get("Metrics in Prometheus' text format", text, error)},
        "/openapi.json": {"get": _get("This document", {"application/json": {"schema": {"type": "object"}}}, error)},
        "/health": {
            "get": {
                "summary": "Tell whether the queen takes jobs",
                "responses": {
                    "200": {"description": "It does", "content": {"application/json": health}},
                    "503": {"description": "It is shutting down", "content": {"application/json": health}},
                    "405": _refusals(error)["405"],
                },
            }
        },
    }


def _control(refs: dict[type, Json], error: Json) -> Json:
    def answers(type_: type | Json, status: str = "200", **body: Json) -> Json:
        schema = refs[type_] if isinstance(type_, type) else type_
        responses = {status: {"description": "Done", "content": {"application/json": {"schema": schema}}}}
        operation: Json = {"security": [{"operator": []}], "responses": responses | _refusals(error)}
        if body:
            operation["requestBody"] = {"required": True, "content": {"application/json": body}}
        return operation

    hive, name = _parameter("hive"), _parameter("name")
    views = {"type": "array", "items": refs[HiveView]}
    log = answers({"type": "string"})
    log["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    log["parameters"] = [
        {
            "name": "lines",
            "in": "query",
            "required": False,
            "schema": {"type": "integer", "minimum": 1, "maximum": 10000},
        }
    ]
    return {
        "/gitops/status": {"get": {**answers(GitopsView), "security": [{}, {"key": []}]}},
        "/gitops/sync": {"post": answers({"type": "object"}, "202")},
        "/v1/orchestrator/status": {"get": answers(QueenStatus)},
        "/v1/orchestrator/load": {"get": answers(QueenLoad)},
        "/v1/orchestrator/hive-report": {"post": answers({"type": "object"}, schema=refs[HiveReport])},
        "/v1/orchestrator/worker-ready": {"post": answers({"type": "object"}, schema=refs[WorkerReport])},
        "/v1/orchestrator/shutdown": {"post": answers({"type": "object"}, "202")},
        "/v1/hives": {"get": answers(views)},
        "/v1/hives/{hive}/workers": {
            "parameters": [hive],
            "post": answers(WorkerReport, "202", schema=refs[SpawnWorker]),
        },
        "/v1/hives/{hive}/workers/{name}": {"parameters": [hive, name], "delete": answers(WorkerReport)},
        "/v1/hives/{hive}/workers/{name}/log": {"parameters": [hive, name], "get": log},
        "/v1/hives/{hive}/models": {"parameters": [hive], "post": answers(ModelReport, "201", schema=refs[AddModel])},
        "/v1/hives/{hive}/models/{name}": {"parameters": [hive, name], "delete": answers(ModelReport)},
    }


def _get(summary: str, content: Json, error: Json) -> Json:
    responses = {"200": {"description": "OK", "content": content}, **_refusals(error)}
    return {"summary": summary, "security": [{}, {"key": []}], "responses": responses}


def _refusals(error: Json) -> Json:
    return {
        status: {"description": text, "content": {"application/json": {"schema": error}}}
        for status, text in REFUSALS.items()
    }


def _parameter(name: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": NAME}
