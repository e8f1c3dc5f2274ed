"""`POST /execute`: the plain form, put on top of the chat and completion endpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import msgspec
from msgspec import Struct

from rbee.errors import NotSupported, RbeeError
from rbee.http.server import Request, Response, reply
from rbee.wire.openai import ExecuteRequest


class _Delta(Struct):
    content: str | None = None


class _Choice(Struct):
    delta: _Delta | None = None
    text: str | None = None


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(_Chunk)


def translate(request: Request, wanted: ExecuteRequest, model: str, capabilities: Collection[str]) -> Request:
    """Return the same wish as a streamed chat or, for a model without one, a text completion. Raises: NotSupported."""
    fields = ("max_tokens", "temperature", "top_p", "seed", "stop")
    body: dict[str, Any] = {name: value for name in fields if (value := getattr(wanted, name)) is not None}
    body |= {"model": wanted.model or model, "stream": True, "stream_options": {"include_usage": True}}
    if "chat" in capabilities:
        turns = [("system", wanted.system), ("user", wanted.prompt)]
        body["messages"] = [{"role": role, "content": text} for role, text in turns if text]
        path = "/v1/chat/completions"
    elif "completion" in capabilities:
        body["prompt"] = f"{wanted.system}\n\n{wanted.prompt}" if wanted.system else wanted.prompt
        path = "/v1/completions"
    else:
        raise NotSupported(f"The model {model} does not generate text")
    return dataclasses.replace(request, path=path, query={}, body=msgspec.json.encode(body))


def present(response: Response, *, stream: bool) -> Response:
    """Return the answer as `{"token": …}` events ending with `{"done": true, …}`, or as that last object alone."""
    assert not isinstance(response.body, bytes)
    if stream:
        return Response(_Events(response.body), response.status, response.content_type, response.headers)
    last: dict[str, Any] = {}
    for last in _steps(response.body):  # noqa: B007
        pass
    if "error" in last:
        problem = RbeeError(last["error"].get("message", "the answer broke off"))
        problem.status, problem.code = 502, last["error"].get("code")  # type: ignore[misc]  # the engine's own
        raise problem
    return reply(last)


class _Events:
    """The events of an answer; closing it closes the answer below, also before its first byte."""

    def __init__(self, body: Iterable[bytes]) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        return (b"data: " + msgspec.json.encode(step) + b"\n\n" for step in _steps(self._body))

    def close(self) -> None:
        _close(self._body)


def _steps(body: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    text: list[str] = []
    usage: dict[str, Any] = {}
    try:
        for data in body:
            for line in data.split(b"\n"):
                if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                    continue
                chunk = _decoder.decode(line[5:])
                if chunk.error is not None:
                    yield {"error": chunk.error}
                    return
                usage = chunk.usage or usage
                for piece in (choice.text or (choice.delta and choice.delta.content) for choice in chunk.choices):
                    if piece:
                        text.append(piece)
                        yield {"token": piece}
        yield {"done": True, "text": "".join(text), "usage": usage}
    finally:
        _close(body)


def _close(body: object) -> None:
    close = getattr(body, "close", None)
    if close is not None:
        close()
