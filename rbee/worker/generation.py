"""One generation: tokens in, safe text out. Stop sequences and UTF-8 may be split over tokens."""

from __future__ import annotations

import codecs
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rbee.plugin import FinishReason, Token


class TextFilter:
    """Turns bytes into text that may be sent: no half character, nothing of a stop sequence."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = [text for text in stop if text]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes, *, final: bool = False) -> str:
        """Return the text that is certain after `data`; after a stop sequence nothing more comes."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(data, final)
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that a stop sequence begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


@dataclass(frozen=True)
class Piece:
    """A part of an answer: its text, and the tokens that it took."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Limits:
    """Where the worker itself ends a generation."""

    max_tokens: int
    stop: tuple[str, ...] = ()


def pieces(tokens: Iterable[Token], limits: Limits) -> Generator[Piece, None, FinishReason]:
    """Yield the pieces of one answer and return why it ended; the backend's generator is closed on every way out."""
    source = iter(tokens)
    filter_ = TextFilter(limits.stop)
    reason: FinishReason = "stop"
    held: list[Token] = []
    count = 0
    try:
        while True:
            try:
                token = next(source)
            except StopIteration as end:
                reason = end.value or "stop"
                break
            count += 1
            held.append(token)
            text = filter_.feed(token.data)
            if text or filter_.stopped:
                yield Piece(text, tuple(held))
                held.clear()
            if filter_.stopped:
                return "stop"
            if count >= limits.max_tokens:
                reason = "length"
                break
    finally:
        _close(source)
    rest = filter_.feed(b"", final=True)
    if rest or held:
        yield Piece(rest, tuple(held))
    return "stop" if filter_.stopped else reason


def _close(source: Iterator[Token]) -> None:
    close = getattr(source, "close", None)
    if close is not None:
        close()
