"""Put a whole answer together from an engine's stream.

Some engines end a job whose client has left only when they stream to it: llama.cpp looks for a client that waits for
a whole answer only after a second in which no job of the engine made a token. From such an engine every answer is
asked for as a stream, so that closing the connection frees the slot at once. Pure: events in, one JSON object out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from rbee.wire.errors import decode_error

Json = dict[str, Any]
REPLACED = frozenset({"id", "index", "name", "role", "type"})
"""Words of a delta that are told as a whole, not in pieces."""


class Assembly(ABC):
    """One answer in the making."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream. Raises: UpstreamError when the engine reports an error in it."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                event = msgspec.json.decode(line[5:])
                if not isinstance(event, dict):
                    continue  # llama.cpp begins a stream of several texts with `null`
                if isinstance(event.get("error"), dict) and event.get("type") in (None, "error"):
                    raise decode_error(_status(event["error"]), line[5:])
                self.add(event)

    @abstractmethod
    def add(self, event: Json) -> None:
        """Take one event."""

    @abstractmethod
    def whole(self) -> bytes:
        """Return the answer as the engine would have given it at once."""


def asked_as_stream(path: str, body: bytes) -> tuple[bytes, Assembly] | None:
    """Return the same request for a stream, and what makes it whole again; None for endpoints that do not stream."""
    make = _ASSEMBLIES.get(path)
    if make is None:
        return None
    request = msgspec.json.decode(body, type=Json)
    assembly = make(request)
    request["stream"] = True
    if path in _WITH_USAGE:
        request["stream_options"] = {"include_usage": True}
    return msgspec.json.encode(request), assembly


class Completion(Assembly):
    """`chat.completion` and `text_completion`: deltas are merged by choice."""

    def __init__(self, kind: str, part: str | None, copies: int) -> None:
        super().__init__()
        self._kind = kind
        self._part = part
        self._copies = copies
        self._head: Json = {}
        self._choices: dict[int, Json] = {}
        self._usage: Json = {}

    def add(self, event: Json) -> None:
        choices, usage = event.pop("choices", []), event.pop("usage", None)
        self._head.update(event)
        for choice in choices:
            index = choice.get("index", 0)
            merge(self._choices.setdefault(index, {"index": index}), choice)
        if usage:
            self._count(usage, choices[0].get("index", 0) if choices else None)

    def whole(self) -> bytes:
        choices = [self._whole_choice(choice) for _, choice in sorted(self._choices.items())]
        body = {"choices": choices, **self._head, "object": self._kind}
        return msgspec.json.encode(body | ({"usage": self._usage} if self._usage else {}))

    def _whole_choice(self, choice: Json) -> Json:
        choice = joined(choice)
        if self._part is None:
            return choice
        message = choice.pop("delta", {})
        for call in message.get("tool_calls") or ():
            call.pop("index", None)
        return {"index": choice.pop("index"), "message": message, **choice}

    def _count(self, usage: Json, index: int | None) -> None:
        """Add up: llama.cpp tells the usage of each answer by itself. Copies of one answer share their prompt."""
        done = self._usage.get("completion_tokens", 0) + usage.get("completion_tokens", 0)
        read = usage.get("prompt_tokens", 0)
        if index is not None:
            read = self._usage.get("prompt_tokens", 0) + (0 if index % self._copies else read)
        self._usage = {**usage, "prompt_tokens": read, "completion_tokens": done, "total_tokens": read + done}


class Message(Assembly):
    """Anthropic's `message`."""

    def __init__(self) -> None:
        super().__init__()
        self._message: Json = {}
        self._blocks: dict[int, Json] = {}

    def add(self, event: Json) -> None:
        kind = event.get("type")
        if kind == "message_start":
            self._message = event["message"]
        elif kind == "content_block_start":
            self._blocks[event["index"]] = dict(event["content_block"])
        elif kind == "content_block_delta":
            delta = {name: value for name, value in event["delta"].items() if name != "type"}
            merge(self._blocks[event["index"]], delta)
        elif kind == "message_delta":
            self._message.update(event.get("delta", {}))
            self._message["usage"] = {**self._message.get("usage", {}), **event.get("usage", {})}

    def whole(self) -> bytes:
        self._message["content"] = [_block(joined(block)) for _, block in sorted(self._blocks.items())]
        return msgspec.json.encode(self._message)


class Response(Assembly):
    """`response` of `/v1/responses`: the last event of its life carries it whole."""

    def __init__(self) -> None:
        super().__init__()
        self._response: Json = {}

    def add(self, event: Json) -> None:
        if isinstance(event.get("response"), dict):
            self._response = event["response"]

    def whole(self) -> bytes:
        return msgspec.json.encode(self._response)


class Pieces(list[str]):
    """A text in the making: joined once, since adding to a long text copies it each time."""


def merge(into: Json, delta: Mapping[str, Any]) -> None:
    """Merge a delta: texts and lists grow, lists of indexed objects merge by index, the rest is replaced."""
    for key, value in delta.items():
        old = into.get(key)
        if value is None:
            into.setdefault(key, None)
        elif isinstance(value, str) and key not in REPLACED and key != "finish_reason":
            into[key] = old if isinstance(old, Pieces) else Pieces([old] if isinstance(old, str) else [])
            into[key].append(value)
        elif isinstance(value, list):
            into[key] = old if isinstance(old, list) else []
            _merge_list(into[key], value)
        elif isinstance(value, dict):
            into[key] = old if isinstance(old, dict) else {}
            merge(into[key], value)
        else:
            into[key] = value


def joined(value: Any) -> Any:
    """Return a value with its texts joined."""
    if isinstance(value, Pieces):
        return "".join(value)
    if isinstance(value, dict):
        return {key: joined(one) for key, one in value.items()}
    return [joined(one) for one in value] if isinstance(value, list) else value


def _merge_list(into: list[Any], values: list[Any]) -> None:
    for value in values:
        index = value.get("index") if isinstance(value, dict) else None
        known = next((one for one in into if isinstance(one, dict) and one.get("index") == index), None)
        if index is None or known is None:
            into.append(value)
        else:
            merge(known, value)


def _block(block: Json) -> Json:
    """Read a tool's input, which a stream tells as pieces of JSON."""
    told = block.pop("partial_json", None)
    if told is not None:
        block["input"] = msgspec.json.decode(told or "{}")
    return block


def _status(error: Json) -> int:
    code = error.get("code")
    return code if isinstance(code, int) and 400 <= code < 600 else 500


_ASSEMBLIES: Mapping[str, Callable[[Json], Assembly]] = {
    "/v1/chat/completions": lambda request: Completion("chat.completion", "delta", request.get("n") or 1),
    "/v1/completions": lambda request: Completion("text_completion", None, request.get("n") or 1),
    "/v1/messages": lambda _: Message(),
    "/v1/responses": lambda _: Response(),
}
_WITH_USAGE = frozenset({"/v1/chat/completions", "/v1/completions"})
