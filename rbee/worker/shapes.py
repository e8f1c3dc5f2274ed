"""Complete what an engine's answers leave out of their schema. Pure: the text that an engine made is never changed.

llama.cpp omits fields that OpenAI's, Open Responses' and Anthropic's schemas require (most of them null), and strict
clients refuse such an answer. Whole answers of the three endpoints are completed, and the events of `/v1/responses`
and `/v1/messages`; every other stream and endpoint goes through as it came.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from rbee.plugin import Sampling

Json = dict[str, Any]
Events = Callable[[bytes], bytes]

RESPONSE_DEFAULTS: Mapping[str, Any] = {
    "background": False,
    "error": None,
    "frequency_penalty": 0,
    "incomplete_details": None,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "output": [],
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": None,
    "safety_identifier": None,
    "service_tier": "default",
    "store": False,
    "temperature": Sampling.temperature,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": Sampling.top_p,
    "truncation": "disabled",
    "usage": None,
}
"""The Open Responses schema's required fields (2026-04-24); `store` and `service_tier` say what holds here."""

ECHOED = frozenset(RESPONSE_DEFAULTS) - {"background", "error", "incomplete_details", "output", "store", "usage"}
"""What a response repeats of its request."""

MESSAGE_USAGE: Mapping[str, Any] = {
    "cache_creation": None,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "inference_geo": None,
    "output_tokens_details": None,
    "server_tool_use": None,
    "service_tier": None,
}


def complete(path: str, request: bytes, answer: bytes, now: float) -> bytes:
    """Return a whole answer to `path` with all fields that its schema requires."""
    completer = _WHOLE.get(path)
    if completer is None:
        return answer
    try:
        body = msgspec.json.decode(answer, type=Json)
    except msgspec.DecodeError:
        return answer
    return msgspec.json.encode(completer(body, request, now))


def events_of(path: str, request: bytes, now: Callable[[], float]) -> Events | None:
    """Return what completes the events of a streamed answer to `path`, or None where they pass as they are."""
    if path == "/v1/messages":
        return message_events
    return ResponseEvents(request, now) if path == "/v1/responses" else None


def chat(body: Json, _request: bytes, _now: float) -> Json:
    """Complete a chat completion (OpenAI API reference)."""
    for choice in _objects(body.get("choices")):
        choice.setdefault("logprobs", None)
        message = choice.get("message")
        if isinstance(message, dict):
            message.setdefault("content", None)
            message.setdefault("refusal", None)
            message.setdefault("annotations", [])
    return body


def message(body: Json, _request: bytes, _now: float) -> Json:
    """Complete a message (Anthropic API reference)."""
    body.setdefault("stop_details", None)
    body.setdefault("container", None)
    _name_stop(body)
    for block in _objects(body.get("content")):
        if block.get("type") == "text":
            block.setdefault("citations", None)
        elif block.get("type") == "tool_use":
            block.setdefault("caller", {"type": "direct"})
    if isinstance(body.get("usage"), dict):
        body["usage"] = {**MESSAGE_USAGE, **body["usage"]}
    return body


def message_events(data: bytes) -> bytes:
    """Return whole events of a streamed message, with the true reason where a stop sequence ended it."""
    if b'"stop_sequence"' not in data:
        return data
    return b"".join(_message_event(event) for event in _BETWEEN_EVENTS.split(data) if event.strip())


def _message_event(event: bytes) -> bytes:
    line = next((line for line in event.split(b"\n") if line.startswith(b"data:")), b"")
    try:
        body = msgspec.json.decode(line[5:], type=Json)
    except msgspec.DecodeError:
        return event + b"\n\n"
    if body.get("type") != "message_delta" or not isinstance(body.get("delta"), dict) or not _name_stop(body["delta"]):
        return event + b"\n\n"
    return _sent(body)


def _name_stop(message: Json) -> bool:
    """Name the stop sequence as what ended a message; llama.cpp gives the sequence, and "end_turn" for the reason."""
    mistaken = bool(message.get("stop_sequence")) and message.get("stop_reason") == "end_turn"
    if mistaken:
        message["stop_reason"] = "stop_sequence"
    return mistaken


def response(body: Json, request: bytes, now: float) -> Json:
    """Complete a response of `/v1/responses`, and tell when its output was cut at the limit."""
    asked = _asked(request)
    said = {key: asked[key] for key in ECHOED if asked.get(key) is not None}
    filled = {**RESPONSE_DEFAULTS, **said, "model": asked.get("model", ""), "created_at": int(now), **body}
    filled["tools"] = [_tool(tool) for tool in _objects(filled["tools"])]
    for item in _objects(filled["output"]):
        _complete_item(item)
    usage = filled["usage"]
    if isinstance(usage, dict):
        usage.setdefault("input_tokens_details", {"cached_tokens": 0})
        usage.setdefault("output_tokens_details", {"reasoning_tokens": 0})
        limit = filled["max_output_tokens"]
        # llama.cpp calls an answer that hit the limit completed.
        if filled.get("status") == "completed" and limit and usage.get("output_tokens", 0) >= limit:
            filled |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    filled.setdefault("completed_at", int(now) if filled.get("status") == "completed" else None)
    return filled


class ResponseEvents:
    """Completes the events of one streamed response: sequence numbers, indices, and the response objects in them."""

    def __init__(self, request: bytes, now: Callable[[], float]) -> None:
        self._request = request
        self._now = now
        self._sequence = 0
        self._items: dict[str, int] = {}
        self._parts: dict[str, int] = {}

    def __call__(self, data: bytes) -> bytes:
        """Return whole events, completed; what is no JSON event of this kind stays as it is."""
        return b"".join(self._event(event) for event in _BETWEEN_EVENTS.split(data) if event.strip())

    def _event(self, event: bytes) -> bytes:
        line = next((line for line in event.split(b"\n") if line.startswith(b"data:")), b"")
        try:
            body = msgspec.json.decode(line[5:], type=Json)
        except msgspec.DecodeError:
            return event + b"\n\n"
        if not str(body.get("type", "")).startswith("response."):
            return event + b"\n\n"
        return b"".join(_sent(one) for one in self._completed(body))

    def _completed(self, body: Json) -> Iterator[Json]:
        item = body.get("item")
        if body["type"] == "response.output_item.done" and isinstance(item, dict) and item["type"] == "function_call":
            yield self._numbered(
                {
                    "type": "response.function_call_arguments.done",
                    "item_id": item.get("id"),
                    "name": item.get("name"),
                    "arguments": item.get("arguments"),
                }
            )
        yield self._numbered(body)

    def _numbered(self, body: Json) -> Json:
        kind = body["type"]
        if isinstance(body.get("response"), dict):
            body["response"] = response(body["response"], self._request, self._now())
            if kind == "response.completed" and body["response"]["status"] == "incomplete":
                body["type"] = "response.incomplete"
        item = body.get("item")
        if isinstance(item, dict):
            _complete_item(item)
        if isinstance(body.get("part"), dict):
            _complete_part(body["part"])
        name = body.get("item_id") or (item.get("id") if isinstance(item, dict) else None)
        if name is not None:
            self._index(body, kind, name)
        body.setdefault("sequence_number", self._sequence)
        self._sequence += 1
        return body

    def _index(self, body: Json, kind: str, item: str) -> None:
        body.setdefault("output_index", self._items.setdefault(item, len(self._items)))
        if kind == "response.content_part.added":
            self._parts[item] = self._parts.get(item, -1) + 1
        if kind.startswith(("response.content_part", "response.output_text", "response.reasoning_text")):
            body.setdefault("content_index", max(0, self._parts.get(item, 0)))
        if kind.startswith("response.output_text"):
            body.setdefault("logprobs", [])
        if kind.startswith("response.reasoning_summary"):
            body.setdefault("summary_index", 0)


def _sent(body: Json) -> bytes:
    return b"event: " + str(body["type"]).encode() + b"\ndata: " + msgspec.json.encode(body) + b"\n\n"


def _complete_item(item: Json) -> None:
    if item.get("type") == "message":
        for part in _objects(item.get("content")):
            _complete_part(part)
    elif item.get("type") == "reasoning":
        item.setdefault("summary", [])


def _complete_part(part: Json) -> None:
    if part.get("type") == "output_text":
        part.setdefault("annotations", [])
        part.setdefault("logprobs", [])


def _tool(tool: Json) -> Json:
    if tool.get("type") != "function":
        return tool
    return {"description": None, "parameters": None, "strict": None, **tool}


def _asked(request: bytes) -> Json:
    try:
        return msgspec.json.decode(request, type=Json)
    except msgspec.DecodeError:
        return {}


def _objects(value: object) -> list[Json]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


_BETWEEN_EVENTS = re.compile(rb"\r?\n\r?\n")

_WHOLE: Mapping[str, Callable[[Json, bytes, float], Json]] = {
    "/v1/chat/completions": chat,
    "/v1/messages": message,
    "/v1/responses": response,
}
