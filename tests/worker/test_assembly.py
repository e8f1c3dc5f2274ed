"""A whole answer put together from a stream is the one that the engine would have given at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from rbee.http.upstream import Upstream
from rbee.testing import RunningWorker, run_worker
from rbee.wire.errors import UpstreamError
from rbee.wire.fleet import WorkerSpec
from rbee.worker.assembly import asked_as_stream, merge

HOW = [{"role": "user", "content": "How do I add a machine?"}]
TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": HOW}),
    "chat with n": ("/v1/chat/completions", {"messages": HOW, "n": 3, "max_tokens": 5}),
    "chat with logprobs": ("/v1/chat/completions", {"messages": HOW, "logprobs": True, "top_logprobs": 2}),
    "chat with a stop": ("/v1/chat/completions", {"messages": HOW, "stop": ["the"]}),
    "chat with a tool": (
        "/v1/chat/completions",
        {"messages": HOW, "tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"},
    ),
    "chat with a schema": (
        "/v1/chat/completions",
        {"messages": HOW, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
    ),
    "text": ("/v1/completions", {"prompt": "A hive is", "max_tokens": 9}),
    "texts": ("/v1/completions", {"prompt": ["A hive is", "A queen is"], "max_tokens": 9}),
    "text with logprobs": ("/v1/completions", {"prompt": "A hive is", "max_tokens": 3, "logprobs": 2}),
    "response": ("/v1/responses", {"input": "How do I add a machine?"}),
    "response with a tool": (
        "/v1/responses",
        {"input": "hi", "tools": [{"type": "function", **TOOL}], "tool_choice": "required"},
    ),
    "message": ("/v1/messages", {"messages": HOW, "max_tokens": 9}),
    "message with a tool": (
        "/v1/messages",
        {
            "messages": HOW,
            "max_tokens": 99,
            "tools": [{"name": TOOL["name"], "input_schema": TOOL["parameters"]}],
            "tool_choice": {"type": "any"},
        },
    ),
}


@pytest.fixture(scope="module")
def engine(demo_spec: WorkerSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    socket = tmp_path_factory.mktemp("a") / "e.sock"
    with run_worker(msgspec.structs.replace(demo_spec, engine_socket=str(socket))) as worker:
        upstream = Upstream(f"unix:{socket}", token=worker.spec.token)
        yield upstream
        upstream.close()


def comparable(value: Any) -> Any:
    """Leave out what differs from one answer to the next: names, clocks, what the cache held, last digits."""
    if isinstance(value, dict):
        changing = ("id", "call_id", "created", "created_at", "completed_at", "timings", "usage")
        return {key: comparable(one) for key, one in value.items() if key not in changing}
    if isinstance(value, list):
        # A stream leaves out the end of the text, which has no text of its own, of the log probabilities.
        return [comparable(one) for one in value if not (isinstance(one, dict) and one.get("token") == "")]
    # Beside a call of a tool, OpenAI's content is null; llama.cpp's whole answer has an empty text.
    return round(value, 1) if isinstance(value, float) else (None if value == "" else value)


def counts(usage: dict[str, Any]) -> dict[str, int]:
    return {key: value for key, value in usage.items() if isinstance(value, int) and "cache" not in key}


@pytest.mark.parametrize("name", REQUESTS)
def test_it_equals_what_the_engine_gives_at_once(engine: Upstream, name: str) -> None:
    path, fields = REQUESTS[name]
    body = json.dumps({"model": "rbee-demo", "temperature": 0, **fields}).encode()
    engine.request("POST", path, body).read()  # so that both find the prompt in the cache
    whole = json.loads(engine.request("POST", path, body).read())
    asked = asked_as_stream(path, body)
    assert asked
    streaming, assembly = asked
    answer = engine.request("POST", path, streaming)
    while data := answer.next(60):
        assembly.feed(data)
    assembled = json.loads(assembly.whole())
    assert comparable(assembled) == comparable(whole)
    if "n" not in fields and not isinstance(fields.get("prompt"), list):
        assert counts(assembled["usage"]) == counts(whole["usage"])


def test_the_tokens_of_all_n_answers_are_counted(demo: RunningWorker) -> None:
    """llama.cpp itself counts one of them."""
    answer = demo.chat("How do I add a machine?", n=3, max_tokens=5, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 15
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 15


def test_endpoints_that_do_not_stream_are_left_alone() -> None:
    for path in ("/v1/embeddings", "/v1/rerank", "/v1/messages/count_tokens", "/tokenize"):
        assert asked_as_stream(path, b"{}") is None


def test_the_request_is_the_same_but_for_the_stream() -> None:
    asked = asked_as_stream("/v1/completions", b'{"prompt": "\\u00fc", "stream": false, "seed": 18446744073709551615}')
    assert asked
    wanted = {"prompt": "ü", "stream": True, "seed": 2**64 - 1, "stream_options": {"include_usage": True}}
    assert json.loads(asked[0]) == wanted


def test_an_error_within_the_stream_is_the_answer() -> None:
    asked = asked_as_stream("/v1/chat/completions", b"{}")
    assert asked
    with pytest.raises(UpstreamError, match="no room") as failed:
        asked[1].feed(b'data: {"error": {"code": 503, "message": "no room"}}\n\n')
    assert failed.value.status == 503


def test_events_may_come_in_any_pieces() -> None:
    events = b'data: {"choices": [{"index": 0, "delta": {"content": "a\\u00fc"}}]}\n\ndata: [DONE]\n\n'
    for size in range(1, len(events)):
        asked = asked_as_stream("/v1/chat/completions", b"{}")
        assert asked
        for at in range(0, len(events), size):
            asked[1].feed(events[at : at + size])
        assert json.loads(asked[1].whole())["choices"][0]["message"] == {"content": "aü"}


def test_calls_merge_by_index() -> None:
    into: dict[str, Any] = {}
    merge(into, {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}]})
    merge(into, {"tool_calls": [{"index": 1, "id": "b", "function": {"name": "g", "arguments": "{}"}}]})
    merge(
        into,
        {
            "tool_calls": [
                {"index": 0, "function": {"arguments": '{"x"'}},
                {"index": 0, "function": {"arguments": ":1}"}},
            ]
        },
    )
    calls = [("".join(call["function"]["arguments"]), call["id"]) for call in into["tool_calls"]]
    assert calls == [('{"x":1}', "a"), ("{}", "b")]
