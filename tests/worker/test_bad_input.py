"""Bad input gets a clear answer in OpenAI's form, on both shapes of worker, and the worker goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rbee.testing import RunningWorker
from rbee.wire.openai import MAX_BODY_BYTES, REQUESTS

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


def sent(worker: RunningWorker, path: str, body: bytes | dict[str, Any], **more: Any) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps({"model": worker.spec.model, **body}).encode()
    answer = worker.send(path, data, **more)
    return answer.status, json.loads(answer.read())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b"", None),
        (b'{"a":' * 20_000, None),
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "bard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": USER, "temperature": 9}, "temperature"),
        ({"messages": USER, "temperature": "hot"}, "temperature"),
        ({"messages": USER, "max_tokens": -1}, "max_tokens"),
        ({"messages": USER, "max_tokens": 2**63}, "max_tokens"),
        ({"messages": USER, "n_discard": -1}, "n_discard"),
        ({"messages": USER, "id_slot": 0}, "id_slot"),
        ({"messages": USER, "stop": ["x"] * 99}, "stop"),
        ({"messages": USER, "n": 0}, "n"),
        ({"messages": USER, "stream": "yes"}, "stream"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_chat_request_is_refused_and_names_the_field(
    worker: RunningWorker, body: bytes | dict[str, Any], param: str | None
) -> None:
    status, answer = sent(worker, CHAT, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"]
    if param:
        assert answer["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1, "two"]}),
        ("/v1/completions", {"prompt": []}),
        ("/v1/embeddings", {"input": ""}),
        ("/v1/rerank", {"query": "", "documents": ["x"]}),
        ("/v1/rerank", {"query": "x", "documents": []}),
        ("/v1/responses", {"input": ""}),
        ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}),
        ("/v1/messages", {"messages": USER}),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{}]}], "max_tokens": 2}),
        ("/v1/messages/count_tokens", {"messages": []}),
        ("/execute", {"prompt": ""}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_requests_to_the_other_endpoints_are_refused(
    worker: RunningWorker, path: str, body: dict[str, Any]
) -> None:
    status, answer = sent(worker, path, body)
    assert status == 400
    assert answer["error"]["message"]


@pytest.mark.parametrize("path", sorted(REQUESTS))
def test_an_unknown_model_is_refused_by_name(worker: RunningWorker, path: str) -> None:
    fields = {"messages": USER, "prompt": "x", "input": "x", "query": "x", "documents": ["x"], "max_tokens": 1}
    status, answer = sent(worker, path, {**fields, "model": "llama-999"})
    assert status == 404
    assert "llama-999" in answer["error"]["message"]
    assert worker.spec.model in answer["error"]["message"]


@pytest.mark.parametrize("token", ["", "wrong", "test-token-", "t\u00e9st"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", path) for path in sorted(REQUESTS)]
    + [("POST", "/execute"), ("POST", "/v1/worker/drain"), ("GET", "/v1/models"), ("GET", "/metrics")]
    + [("GET", "/slots"), ("GET", "/nothing"), ("POST", "/lora-adapters")],
)
def test_every_route_but_health_needs_the_token(worker: RunningWorker, method: str, path: str, token: str) -> None:
    status, answer = sent(worker, path, b"{}", method=method, token=token)
    assert status == 401
    assert answer["error"]["type"].endswith("authentication_error")
    assert worker.health().status == "ready"


def test_health_needs_no_token(worker: RunningWorker) -> None:
    status, answer = sent(worker, "/health", b"", method="GET", token="")
    assert (status, answer["status"]) == (200, "ready")


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(worker: RunningWorker, method: str) -> None:
    status, answer = sent(worker, CHAT, b"", method=method)
    assert status == 405
    assert method in answer["error"]["message"]


def test_a_body_over_the_limit_is_refused(worker: RunningWorker) -> None:
    status, answer = sent(worker, CHAT, {"messages": [{"role": "user", "content": "x" * MAX_BODY_BYTES}]})
    assert status == 413
    assert str(MAX_BODY_BYTES) in answer["error"]["message"]


def test_a_prompt_longer_than_the_context_names_both_numbers(worker: RunningWorker) -> None:
    context = worker.health().context_tokens
    status, answer = sent(worker, CHAT, {"messages": [{"role": "user", "content": "long " * context}]})
    assert status == 400
    assert answer["error"]["code"] == "context_length_exceeded"
    assert f"{context} tokens" in answer["error"]["message"]


def test_images_to_a_model_without_eyes_are_refused(worker: RunningWorker) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    status, answer = sent(worker, CHAT, {"messages": [{"role": "user", "content": [image]}]})
    assert status == 400
    assert "vision" in answer["error"]["message"]


def test_an_answering_engine_refuses_what_it_lacks(echo: RunningWorker) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    for fields in ({"tools": [tool]}, {"response_format": form}, {"logprobs": True}):
        status, answer = sent(echo, CHAT, {"messages": USER, **fields})
        assert status == 400
        assert answer["error"]["code"] == "not_supported"
    status, answer = sent(echo, "/v1/responses", {"input": "hi"})
    assert status == 400
    status, answer = sent(echo, "/v1/messages", {"messages": USER, "max_tokens": 2})
    assert status == 400
    assert answer["type"] == "error"


def test_a_path_that_nobody_knows_is_not_found(worker: RunningWorker) -> None:
    status, answer = sent(worker, "/v1/nothing", b"", method="GET")
    assert status == 404
    assert answer["error"]["message"]
