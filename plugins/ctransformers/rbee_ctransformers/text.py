"""Cutting a long text before the engine's tokenizer sees it.

The tokenizer of the GPT families splits words with std::regex, which recurses once per character and overflows the
stack on long ones, and copies the rest of the text after every word.
"""

from __future__ import annotations

from collections.abc import Iterator

MAX_PART_BYTES = 4096
MAX_WORD_BYTES = 256
"""A run without a space is cut here: the tokenizer tries every substring of a word."""

_SPACES = b" \t\r\n\v\f"


def parts(text: bytes) -> Iterator[bytes]:
    """Cut a text where the tokenizer would cut it into words anyway; NUL, which ends its strings, is left out."""
    rest = text.replace(b"\0", b"")
    while rest:
        end = len(rest) if len(rest) <= MAX_PART_BYTES else _boundary(rest)
        yield from _short_words(rest[:end])
        rest = rest[end:]


def _boundary(text: bytes) -> int:
    """Return the last place before the limit where white space follows a word, at a line's end if there is one."""
    for space in (b"\n", b" "):
        at = MAX_PART_BYTES
        while (at := text.rfind(space, 1, at)) > 0:
            if text[at - 1] not in _SPACES:
                return at
    at = MAX_PART_BYTES
    while at > 1 and _inside_character(text[at]):
        at -= 1
    return at


def _short_words(text: bytes) -> Iterator[bytes]:
    start = run = 0
    for at, byte in enumerate(text):
        run = 0 if byte in _SPACES else run + 1
        if run > MAX_WORD_BYTES and not _inside_character(byte):
            yield text[start:at]
            start, run = at, 1
    yield text[start:]


def _inside_character(byte: int) -> bool:
    return byte & 0xC0 == 0x80  # a continuation byte of UTF-8 (RFC 3629)
