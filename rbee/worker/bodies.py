"""The bodies of OpenAI's chat and text completions, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec

from rbee.plugin import FinishReason, Sampling, Token
from rbee.wire.openai import Generation
from rbee.worker.generation import Limits, Piece


@dataclass(frozen=True)
class Choice:
    """One answer to be generated; `copy` counts the answers to the same prompt."""

    index: int
    copy: int
    prompt: Sequence[int]
    sampling: Sampling
    limits: Limits


Step = tuple[Choice, Piece | FinishReason]
"""A choice, and its next piece or why it ended."""


@dataclass
class _Collected:
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


class Body(ABC):
    """An answer in the making: `add` every step for a whole body, or take `chunks` of every step."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(self, wanted: Generation) -> None:
        name = f"{self.prefix}-{secrets.token_hex(12)}"
        self._head = {"id": name, "created": int(time.time()), "model": wanted.model}
        self._with_usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
        self._with_logprobs = bool(getattr(wanted, "logprobs", None))
        self._choices: dict[int, _Collected] = {}
        self._prompt_tokens = 0
        self._completion_tokens = 0

    def add(self, choice: Choice, step: Piece | FinishReason) -> None:
        """Collect one step."""
        collected = self._collected(choice)
        if isinstance(step, Piece):
            collected.text.append(step.text)
            collected.logprobs += self._logprobs(step)
            self._completion_tokens += len(step.tokens)
        else:
            collected.finish_reason = step

    def whole(self) -> dict[str, Any]:
        """Return the body of an answer that does not stream."""
        choices = [self._whole_choice(index, choice) for index, choice in sorted(self._choices.items())]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._usage()}

    @abstractmethod
    def chunks(self, choice: Choice, step: Piece | FinishReason) -> Iterator[bytes]:
        """Yield the chunks that one step makes."""

    def last_chunks(self) -> Iterator[bytes]:
        """Yield the chunk with the usage, when it was asked for."""
        if self._with_usage:
            yield self._chunk([], self._usage())

    @abstractmethod
    def _whole_choice(self, index: int, collected: _Collected) -> dict[str, Any]: ...

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        return [_logprob(token) for token in piece.tokens if token.logprob is not None] if self._with_logprobs else []

    def _collected(self, choice: Choice) -> _Collected:
        if choice.index not in self._choices:
            self._choices[choice.index] = _Collected()
            # Copies of an answer read the same prompt once.
            self._prompt_tokens += 0 if choice.copy else len(choice.prompt)
        return self._choices[choice.index]

    def _usage(self) -> dict[str, int]:
        prompt, completion = self._prompt_tokens, self._completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        body = {**self._head, "object": self.chunk_kind, "choices": choices}
        if self._with_usage:
            body["usage"] = usage
        return msgspec.json.encode(body)


class ChatBody(Body):
    """`chat.completion` (OpenAI API reference, "The chat completion object")."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def chunks(self, choice: Choice, step: Piece | FinishReason) -> Iterator[bytes]:
        if choice.index not in self._choices:
            yield self._chunk([self._part(choice, {"role": "assistant", "content": ""}, None, [])])
        self.add(choice, step)
        if isinstance(step, Piece):
            yield self._chunk([self._part(choice, {"content": step.text}, None, self._logprobs(step))])
        else:
            yield self._chunk([self._part(choice, {}, step, [])])

    def _part(
        self, choice: Choice, delta: dict[str, Any], finish_reason: str | None, logprobs: list[dict[str, Any]]
    ) -> dict[str, Any]:
        told = {"content": logprobs} if logprobs else None
        return {"index": choice.index, "delta": delta, "logprobs": told, "finish_reason": finish_reason}

    def _whole_choice(self, index: int, collected: _Collected) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(collected.text),
            "refusal": None,
            "annotations": [],
        }
        told = {"content": collected.logprobs, "refusal": None} if collected.logprobs else None
        return {"index": index, "message": message, "logprobs": told, "finish_reason": collected.finish_reason}


class CompletionBody(Body):
    """`text_completion` (OpenAI API reference, "The completion object")."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def chunks(self, choice: Choice, step: Piece | FinishReason) -> Iterator[bytes]:
        self.add(choice, step)
        text, reason = (step.text, None) if isinstance(step, Piece) else ("", step)
        told = _legacy(self._logprobs(step)) if isinstance(step, Piece) else None
        yield self._chunk([{"index": choice.index, "text": text, "logprobs": told, "finish_reason": reason}])

    def _whole_choice(self, index: int, collected: _Collected) -> dict[str, Any]:
        reason = collected.finish_reason
        told = _legacy(collected.logprobs)
        return {"index": index, "text": "".join(collected.text), "logprobs": told, "finish_reason": reason}


def _logprob(token: Token) -> dict[str, Any]:
    text = token.data.decode(errors="replace")
    return {"token": text, "logprob": token.logprob, "bytes": list(token.data), "top_logprobs": []}


def _legacy(logprobs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return log probabilities in the older form of text completions."""
    if not logprobs:
        return None
    return {"tokens": [one["token"] for one in logprobs], "token_logprobs": [one["logprob"] for one in logprobs]}
