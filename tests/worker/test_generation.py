"""Text from tokens: stop sequences and characters that are split over tokens."""

from __future__ import annotations

import random
from collections.abc import Generator

import pytest

from rbee.plugin import FinishReason, Token
from rbee.worker.generation import Limits, TextFilter, pieces

TEXT = "Grüße, 蜜蜂 🐝! STOP here or ST0P or even STSTOP."


def cut(data: bytes, seed: int) -> list[bytes]:
    dice, parts, at = random.Random(seed), [], 0
    while at < len(data):
        size = dice.randint(1, 5)
        parts.append(data[at : at + size])
        at += size
    return parts


def read(parts: list[bytes], stop: tuple[str, ...]) -> list[str]:
    filter_ = TextFilter(stop)
    return [filter_.feed(part) for part in parts] + [filter_.feed(b"", final=True)]


@pytest.mark.parametrize("stop", [(), ("STOP",), ("zzz", "ST"), ("🐝",), ("even STSTOP.",), ("STOP here", "STOP or")])
@pytest.mark.parametrize("seed", range(20))
def test_however_it_is_split_the_text_is_the_same(stop: tuple[str, ...], seed: int) -> None:
    ends = [TEXT.index(one) for one in stop if one in TEXT]
    expected = TEXT[: min(ends)] if ends else TEXT
    assert "".join(read(cut(TEXT.encode(), seed), stop)) == expected


def test_nothing_of_a_stop_sequence_is_sent_before_it_is_certain() -> None:
    assert read([b"a ST", b"O", b"X ST", b"OP b"], ("STOP",)) == ["a ", "", "STOX ", "", ""]


def test_a_half_character_at_the_end_becomes_the_replacement_sign() -> None:
    assert "".join(read(["🐝".encode()[:2]], ())) == "\ufffd"


def source(closed: list[bool], reason: FinishReason = "stop") -> Generator[Token, None, FinishReason]:
    try:
        for letter in b"abcdef":
            yield Token(bytes([letter]))
        return reason
    finally:
        closed.append(True)


def run(limits: Limits, reason: FinishReason = "stop") -> tuple[str, int, str, list[bool]]:
    closed: list[bool] = []
    steps = pieces(source(closed, reason), limits)
    text, count = "", 0
    while True:
        try:
            piece = next(steps)
        except StopIteration as end:
            return text, count, end.value, closed
        text, count = text + piece.text, count + len(piece.tokens)


@pytest.mark.parametrize(
    ("limits", "text", "count", "reason"),
    [
        (Limits(10), "abcdef", 6, "stop"),
        (Limits(3), "abc", 3, "length"),
        (Limits(10, ("cd",)), "ab", 4, "stop"),
        (Limits(3, ("cd",)), "abc", 3, "length"),
        (Limits(4, ("cd",)), "ab", 4, "stop"),
    ],
)
def test_an_answer_ends_at_its_limits_and_closes_the_engine(limits: Limits, text: str, count: int, reason: str) -> None:
    assert run(limits) == (text, count, reason, [True])


def test_the_engines_own_reason_is_kept() -> None:
    assert run(Limits(10), "length")[2] == "length"
