"""Checks a GGUF file's tokenizer and chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rbee.formats.gguf import KEPT_STRING_BYTES, STRING, ArrayAt, strings_of
from rbee.formats.gguf_claims import Claims, a_or_an
from rbee.formats.reading import LeftOut, shown

MAX_VOCABULARY = 1_048_576
MAX_TOKEN_BYTES = 64 * 1024
_BYTE_TYPE = 6
_BYTE_TOKEN = re.compile(rb"<0x[0-9A-Fa-f]{2}>")
_TOKENIZER = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"


def chat_template(claims: Claims) -> str | None:
    """Return the default chat template; refuse one, default or named, that is too long to be one."""
    for key in claims.gguf.types:
        value = claims.gguf.metadata[key]
        if key.startswith(_TEMPLATE) and isinstance(value, LeftOut) and value.type == "string":
            claims.refuse(key, f"has {value.length} bytes; {KEPT_STRING_BYTES} are allowed")
    template = claims.gguf.metadata.get(_TEMPLATE)
    if template is not None and not isinstance(template, str):
        claims.refuse(_TEMPLATE, f"is {a_or_an(claims.gguf.types[_TEMPLATE])}; it must be a string")
    return template


def check_tokenizer(claims: Claims, *, required: bool) -> int:
    """Check that the tokenizer's arrays agree; return the number of tokens."""
    kind = claims.text(_TOKENIZER + "model", required=required)
    if not kind or kind in ("none", "no_vocab"):
        return 0
    tokens = claims.gguf.arrays.get(_TOKENIZER + "tokens")
    if tokens is None or tokens.element != STRING:
        claims.refuse(_TOKENIZER + "tokens", "must be an array of strings")
    if not 0 < tokens.length <= MAX_VOCABULARY:
        claims.refuse(_TOKENIZER + "tokens", f"has {tokens.length} tokens; 1 to {MAX_VOCABULARY} are allowed")
    _check_array(claims, _TOKENIZER + "scores", ("float32", "int32"), tokens.length)
    _check_array(claims, _TOKENIZER + "token_type", ("int32",), tokens.length)
    _check_array(claims, _TOKENIZER + "merges", ("string",), None)
    _check_array(claims, _TOKENIZER + "precompiled_charsmap", ("int8", "uint8"), None)
    _check_tokens(claims, tokens)
    return tokens.length


def _check_array(claims: Claims, key: str, types: tuple[str, ...], length: int | None) -> None:
    if key not in claims.gguf.types:
        return
    if claims.gguf.types[key] not in {f"array of {name}" for name in types}:
        claims.refuse(key, f"is {a_or_an(claims.gguf.types[key])}; it must be an array of {' or '.join(types)}")
    if length is not None and claims.gguf.arrays[key].length != length:
        claims.refuse(key, f"has {claims.gguf.arrays[key].length} elements for {length} tokens")


def _check_tokens(claims: Claims, tokens: ArrayAt) -> None:
    """Refuse a token that occurs twice, at which llama.cpp ends the process, and a byte token that names no byte.

    A bitmap marks each token's hash; only tokens that meet a marked bit are compared as text in a second pass. So the
    memory is at most 16 MiB plus a few thousand tokens, whatever the file claims; a set of all tokens would take 100.
    """
    byte_tokens = _byte_tokens(claims, tokens.length)
    mask = (1 << max(16, (64 * tokens.length).bit_length())) - 1
    seen = bytearray((mask + 1) >> 3)
    suspects: set[int] = set()
    for index, token in enumerate(_tokens(claims, tokens)):
        if index in byte_tokens and not _BYTE_TOKEN.fullmatch(token):
            claims.refuse(_TOKENIZER + "tokens", f"has the byte token {index}, {shown(token)}, which names no byte")
        place = hash(token) & mask
        if seen[place >> 3] >> (place & 7) & 1:
            suspects.add(place)
        seen[place >> 3] |= 1 << (place & 7)
    if suspects:
        _refuse_twins(claims, tokens, suspects, mask)


def _tokens(claims: Claims, tokens: ArrayAt) -> Iterator[bytes]:
    """Yield the tokens as llama.cpp sees them: up to the first zero byte, and with a text for an empty one."""
    for index, token in enumerate(strings_of(claims.file, tokens, "token", MAX_TOKEN_BYTES)):
        yield token.partition(b"\0")[0] or b"[EMPTY_%d]" % index


def _byte_tokens(claims: Claims, length: int) -> frozenset[int]:
    types = claims.gguf.arrays.get(_TOKENIZER + "token_type")
    if types is None:
        return frozenset()
    claims.file.at = types.offset
    numbers = memoryview(claims.file.take(4 * length, "the token types")).cast("i")
    return frozenset(index for index, number in enumerate(numbers) if number == _BYTE_TYPE)


def _refuse_twins(claims: Claims, tokens: ArrayAt, suspects: set[int], mask: int) -> None:
    first: dict[bytes, int] = {}
    for index, token in enumerate(_tokens(claims, tokens)):
        if hash(token) & mask not in suspects:
            continue
        if token in first:
            claims.refuse(_TOKENIZER + "tokens", f"has {shown(token)} twice, as tokens {first[token]} and {index}")
        first[token] = index
