"""What an engine leaves out of its schema is filled in; what it said stays."""

from __future__ import annotations

import json
from typing import Any

from rbee.worker.shapes import complete, events_of


def test_a_chat_gets_its_nulls_and_keeps_the_rest() -> None:
    engine = {
        "id": "1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}}],
        "timings": {"a": 1.5},
    }
    body = json.loads(complete("/v1/chat/completions", b"{}", json.dumps(engine).encode(), 0.0))
    choice = body["choices"][0]
    assert choice["logprobs"] is None
    assert choice["message"] == {"role": "assistant", "content": "x", "refusal": None, "annotations": []}
    assert body["timings"] == {"a": 1.5}


def test_what_an_engine_says_is_not_changed() -> None:
    engine = {
        "choices": [{"logprobs": {"content": []}, "message": {"refusal": "no", "annotations": [1], "content": None}}]
    }
    assert json.loads(complete("/v1/chat/completions", b"{}", json.dumps(engine).encode(), 0.0)) == engine


def test_other_endpoints_pass_byte_for_byte() -> None:
    data = b'{ "object":  "list" , "x": 1e-07 }'
    assert complete("/v1/embeddings", b"{}", data, 0.0) == data
    assert complete("/v1/chat/completions", b"{}", b"no json", 0.0) == b"no json"
    assert events_of("/v1/chat/completions", b"{}", float) is None


def test_a_response_repeats_its_request() -> None:
    asked = {"model": "m", "input": "x", "instructions": "be kind", "temperature": 0.5, "max_output_tokens": 9}
    engine = {"id": "resp_1", "object": "response", "status": "completed", "output": [], "usage": usage(3)}
    body = json.loads(complete("/v1/responses", json.dumps(asked).encode(), json.dumps(engine).encode(), 7.0))
    assert (body["instructions"], body["temperature"], body["max_output_tokens"]) == ("be kind", 0.5, 9)
    assert (body["status"], body["completed_at"], body["error"], body["store"]) == ("completed", 7, None, False)
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}


def test_a_response_that_hit_its_limit_is_incomplete() -> None:
    engine = {"id": "resp_1", "status": "completed", "output": [], "usage": usage(9)}
    asked = b'{"model": "m", "max_output_tokens": 9}'
    body = json.loads(complete("/v1/responses", asked, json.dumps(engine).encode(), 7.0))
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}


def test_events_of_a_response_are_numbered_and_keep_their_deltas() -> None:
    told: list[dict[str, Any]] = [
        {"type": "response.created", "response": {"id": "r", "status": "in_progress"}},
        {"type": "response.output_item.added", "item": {"id": "m", "type": "message", "content": []}},
        {"type": "response.content_part.added", "item_id": "m", "part": {"type": "output_text", "text": ""}},
        {"type": "response.output_text.delta", "item_id": "m", "delta": 'a"\u00fc\n'},
        {"type": "response.output_item.added", "item": {"id": "f", "type": "function_call"}},
        {
            "type": "response.output_item.done",
            "item": {"id": "f", "type": "function_call", "name": "n", "arguments": "{}"},
        },
        {"type": "response.completed", "response": {"id": "r", "status": "completed", "output": [], "usage": usage(1)}},
    ]
    data = b"".join(f"event: {one['type']}\ndata: {json.dumps(one)}\n\n".encode() for one in told)
    completed = events_of("/v1/responses", b'{"model": "m"}', lambda: 7.0)
    assert completed
    events = read(completed(data))
    assert [event["sequence_number"] for event in events] == list(range(8))
    assert events[3] == {**told[3], "output_index": 0, "content_index": 0, "logprobs": [], "sequence_number": 3}
    assert events[4]["output_index"] == 1
    assert (events[5]["type"], events[5]["arguments"]) == ("response.function_call_arguments.done", "{}")
    assert events[7]["response"]["completed_at"] == 7
    assert events[0]["response"]["model"] == "m"


def test_what_is_no_event_of_a_response_passes() -> None:
    completed = events_of("/v1/responses", b"{}", lambda: 7.0)
    assert completed
    assert completed(b": ping\n\ndata: [DONE]\n\n") == b": ping\n\ndata: [DONE]\n\n"


def usage(output: int) -> dict[str, int]:
    return {"input_tokens": 1, "output_tokens": output, "total_tokens": 1 + output}


def read(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[5:]) for line in data.split(b"\n") if line.startswith(b"data:")]


def test_a_message_that_a_stop_sequence_ended_says_so() -> None:
    whole = {"type": "message", "content": [], "stop_reason": "end_turn", "stop_sequence": "into"}
    body = json.loads(complete("/v1/messages", b"{}", json.dumps(whole).encode(), 7.0))
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "into")
    for reason, sequence in (("end_turn", None), ("max_tokens", None), ("tool_use", "x")):
        kept = {**whole, "stop_reason": reason, "stop_sequence": sequence}
        body = json.loads(complete("/v1/messages", b"{}", json.dumps(kept).encode(), 7.0))
        assert (body["stop_reason"], body["stop_sequence"]) == (reason, sequence)


def test_a_streamed_message_says_it_too_and_passes_otherwise_as_it_came() -> None:
    completed = events_of("/v1/messages", b"{}", lambda: 7.0)
    assert completed
    text = (
        b'event: content_block_delta\ndata: {"type":"content_block_delta", "delta":{"text":"\\"stop_sequence\\""}}\n\n'
    )
    start = b'event: message_start\ndata: {"type": "message_start", "message": {"stop_sequence": null}}\n\n'
    end = b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"%s","stop_sequence":%s}}\n\n'
    assert completed(start + text) == start + text
    assert completed(end % (b"end_turn", b"null")) == end % (b"end_turn", b"null")
    assert completed(b"data: [DONE]\n\n") == b"data: [DONE]\n\n"
    (_, last) = read(completed(text + end % (b"end_turn", b'"into"')))
    assert last["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "into"}
