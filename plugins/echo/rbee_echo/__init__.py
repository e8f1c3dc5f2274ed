"""A backend without a model: the reference for plugin authors, and a fast stand-in for tests.

It says the last user message back, word by word. To write your own backend, copy this file: answer the questions at
the top of the class, load your engine in `load`, and turn token ids into `Token`s in `generate`.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Generator, Sequence

from rbee.plugin import (
    AnsweringBackend,
    Cancelled,
    Capability,
    FinishReason,
    Loaded,
    ModelSpec,
    Progress,
    Sampling,
    Token,
)

DIMENSIONS = 64
CONTEXT_TOKENS = 8192
LOOK_S = 0.01


class EchoBackend(AnsweringBackend):
    """Say back what came in. A token of a prompt is one byte of UTF-8, a token of an answer is one word."""

    name = "echo"
    summary = "says the last user message back, word by word; needs no model"
    capabilities = frozenset({Capability.CHAT, Capability.COMPLETION, Capability.EMBEDDING, Capability.RERANK})
    options = {
        "delay_ms": "milliseconds before each word (default 0)",
        "fail": "break on purpose: load, first (before the first word), middle (after it) or hang",
    }

    def load(self, spec: ModelSpec, progress: Progress) -> Loaded:
        """Read the options; a real engine loads its model here and calls `progress` with 0.0 to 1.0."""
        self._delay_s = float(spec.options.get("delay_ms", "0")) / 1000
        self._fail = spec.options.get("fail", "")
        if self._fail not in ("", "load", "first", "middle", "hang"):
            raise ValueError(f"the option fail is one of load, first, middle, hang, not {self._fail!r}")
        if self._fail == "load":
            raise RuntimeError("this load fails because the option fail=load says so")
        progress(1.0)
        return Loaded(slots=spec.slots or 4, context_tokens=spec.context_tokens or CONTEXT_TOKENS)

    def chat_template(self) -> str:
        """Keep the last user message only; a real model brings its own template."""
        return "{{ (messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | last) or '' }}"

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Return the bytes of the text: there are no control tokens here."""
        return list(text.encode())

    def generate(
        self, prompt: Sequence[int], sampling: Sampling, cancelled: Cancelled
    ) -> Generator[Token, None, FinishReason]:
        """Yield the prompt's words; nothing here is random, so `temperature` and `seed` change nothing."""
        words = re.findall(rb"\s*\S+\s*$|\s*\S+", bytes(prompt))
        for index, word in enumerate(words):
            if index == sampling.max_tokens:
                return "length"
            if self._wait(cancelled) or cancelled():
                break
            self._break_on_purpose(index)
            yield Token(word)
        return "stop"

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return unit vectors; texts that share words point in similar directions."""
        return [_vector(bytes(tokens).decode(errors="replace")) for tokens in inputs]

    def rerank(self, query: str, documents: Sequence[str]) -> tuple[list[float], int]:
        """Score a document by the share of the query's words that it has."""
        wanted = _words(query)
        scores = [len(wanted & _words(text)) / (len(wanted) or 1) for text in documents]
        return scores, sum(len(text.encode()) for text in (query, *documents))

    def _wait(self, cancelled: Cancelled) -> bool:
        """Wait for `delay_ms`, or for ever; return True when the job was cancelled meanwhile."""
        end = math.inf if self._fail == "hang" else time.monotonic() + self._delay_s
        while (left := end - time.monotonic()) > 0:
            if cancelled():
                return True
            time.sleep(min(left, LOOK_S))
        return False

    def _break_on_purpose(self, index: int) -> None:
        if (self._fail, index) in (("first", 0), ("middle", 1)):
            raise RuntimeError(f"this job fails because the option fail={self._fail} says so")


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _vector(text: str) -> list[float]:
    total = [1e-9] * DIMENSIONS
    for word in _words(text):
        digest = hashlib.shake_128(word.encode()).digest(DIMENSIONS)
        total = [sum_ + byte - 127.5 for sum_, byte in zip(total, digest, strict=True)]
    length = math.sqrt(sum(value * value for value in total))
    return [value / length for value in total]
