"""One question to a queen and its streamed answer, as `rbee infer` and `rbee proof verify` need them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

from rbee.client import events
from rbee.errors import RbeeError, TimedOut, WorkerLost
from rbee.http.upstream import Answer, Upstream
from rbee.wire.errors import decode_error

FIRST_BYTE_TIMEOUT_S = 1800.0
"""A worker may have to load a large model from a slow disk first; the queen has limits of its own below this."""
SILENCE_TIMEOUT_S = 600.0

OnEvent = Callable[[float, str], None]


@dataclass(frozen=True)
class Question:
    """What is asked of a model; None leaves a setting to the model's engine."""

    model: str
    prompt: str
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    hive: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def body(self) -> bytes:
        """Return the request body for `/v1/chat/completions`."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        given = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed, **self.extra}
        return msgspec.json.encode(
            {
                "model": self.model,
                "messages": [*system, {"role": "user", "content": self.prompt}],
                "stream": True,
                "stream_options": {"include_usage": True},
                **{name: value for name, value in given.items() if value is not None},
            }
        )


class Usage(Struct, frozen=True):
    """How many tokens were read and written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class _Delta(Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(Struct, frozen=True):
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class _Timings(Struct, frozen=True):
    predicted_per_second: float | None = None


class _Chunk(Struct, frozen=True):
    choices: list[_Choice] = []
    usage: Usage | None = None
    timings: _Timings | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)


class Reply:
    """A streamed answer: its head at once, its text as it comes; times are in seconds since the question.

    `on_event` is given the time and the data of every server-sent event.
    """

    def __init__(self, answer: Answer, asked_at: float, on_event: OnEvent | None = None) -> None:
        self.job = answer.headers.get("x-rbee-job", "")
        self.worker = answer.headers.get("x-rbee-worker", "")
        self.text = ""
        self.reasoning = ""
        self.usage: Usage | None = None
        self.finish_reason = ""
        self.first_token_s: float | None = None
        self.total_s = 0.0
        self._timings: _Timings | None = None
        self._answer = answer
        self._asked_at = asked_at
        self._on_event = on_event

    def texts(self) -> Iterator[str]:
        """Yield the pieces of the answer; "" stands for progress that is not part of its text, such as reasoning.

        Raises: WorkerLost when the answer is cut off, TimedOut, or what the queen reports in the stream.
        """
        for data in events(self._answer, silence_s=SILENCE_TIMEOUT_S):
            if data == "[DONE]":
                self._note(data)
                break
            chunk = self._decode(data)
            for choice in chunk.choices[:1]:
                yield from self._take(choice)
            self.usage = chunk.usage or self.usage
            self._timings = chunk.timings or self._timings
            self._note(data)
        else:
            raise WorkerLost("The answer was cut off before its end", hint="the same command again")
        self.total_s = time.monotonic() - self._asked_at

    def tokens_per_second(self) -> float | None:
        """Return the engine's own measure of its speed, else that from the first token to the last.

        None for an answer too short to tell.
        """
        if self._timings and self._timings.predicted_per_second:
            return self._timings.predicted_per_second
        tokens = self.usage.completion_tokens if self.usage else 0
        if self.first_token_s is None or tokens < 2 or self.total_s <= self.first_token_s:
            return None
        return (tokens - 1) / (self.total_s - self.first_token_s)

    def close(self) -> None:
        """End the exchange; when the answer is not whole, its job is cancelled."""
        self._answer.close()

    def _decode(self, data: str) -> _Chunk:
        try:
            chunk = _chunk.decode(data)
        except msgspec.DecodeError as problem:
            raise RbeeError(f"The answer holds an event that is not understood ({problem})") from None
        if chunk.error is not None:
            self._note(data)
            raise decode_error(500, data.encode())
        return chunk

    def _take(self, choice: _Choice) -> Iterator[str]:
        text, reasoning = choice.delta.content or "", choice.delta.reasoning_content or ""
        if (text or reasoning) and self.first_token_s is None:
            self.first_token_s = time.monotonic() - self._asked_at
        self.text += text
        self.reasoning += reasoning
        self.finish_reason = choice.finish_reason or self.finish_reason
        yield text

    def _note(self, data: str) -> None:
        if self._on_event is not None:
            self._on_event(time.monotonic() - self._asked_at, data)


def ask(url: str, token: str, question: Question, on_event: OnEvent | None = None) -> Reply:
    """Send a question and return its answer once it begins. Raises: Unreachable, or what the queen answers."""
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    if question.hive:
        headers["X-Rbee-Hive"] = question.hive
    asked_at = time.monotonic()
    upstream = Upstream(url, token=token)
    answer = upstream.request(
        "POST", "/v1/chat/completions", question.body(), headers=headers, timeout_s=FIRST_BYTE_TIMEOUT_S
    )
    if answer.status >= 400:
        raise decode_error(answer.status, answer.read(1_000_000, 10.0))
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        answer.close()
        raise TimedOut(f"{url} answered, but is no queen", hint="the address of a queen")
    return Reply(answer, asked_at, on_event)
