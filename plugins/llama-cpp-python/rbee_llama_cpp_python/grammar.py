"""A JSON schema as a GBNF grammar, by llama-cpp-python's own converter, with bounds that the converter lacks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llama_cpp.llama_grammar import PRIMITIVE_RULES, BuiltinRule, SchemaConverter

MAX_REPETITION = 1000
"""The converter writes a repetition out as nested brackets, each of which llama.cpp parses on its C++ stack."""

MAX_GRAMMAR_CHARACTERS = 262_144

_COUNTS = frozenset({"minItems", "maxItems", "minLength", "maxLength"})


def schema_grammar(schema: Mapping[str, object]) -> str:
    """Return the GBNF grammar of a JSON schema; raise ValueError when the schema cannot be enforced."""
    _check_counts(schema)
    try:
        make: Any = _Converter  # llama_cpp gives its methods no types
        converter = make(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
        converter.visit(converter.resolve_refs(json.loads(json.dumps(schema)), "schema"), "")
        grammar: str = converter.format_grammar()
    except Exception as error:  # the converter asserts, indexes and recurses on what a client sent
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error) or type(error).__name__
        raise ValueError(f"This JSON schema cannot be enforced: {reason[:300]}") from error
    if len(grammar) > MAX_GRAMMAR_CHARACTERS:
        raise ValueError("This JSON schema cannot be enforced: its grammar is too large")
    return grammar


_CHARACTER = BuiltinRule(
    r'[^"\\\x7F\x00-\x1F\U00110000-\U003FFFFF] | "\\" (["\\/bfnrt] | "u"' + " [0-9a-fA-F]" * 4 + ")",
    [],
)
"""What may stand in a string: the original takes raw line breaks, which are no JSON, and bytes that are no UTF-8."""


class _Converter(SchemaConverter):
    """The converter, with names and constants as a model writes them.

    The original escapes no backslash, so a quotation mark in a constant ends the literal early, and it asks for every
    character beyond ASCII as one or two `\\u` escapes, which GBNF reads as characters of their own.
    """

    def _add_primitive(self, name: str, rule: BuiltinRule) -> str:
        key: str = super()._add_primitive(name, _CHARACTER if rule is PRIMITIVE_RULES["char"] else rule)
        return key

    def _format_literal(self, literal: str) -> str:
        text = json.dumps(json.loads(literal), ensure_ascii=False)
        escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
        return f'"{escaped}"'


def _check_counts(node: object) -> None:
    pending = [node]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            for key, inner in value.items():
                _check_count(key, inner)
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)


def _check_count(key: str, value: object) -> None:
    counts: list[object] = []
    if key in _COUNTS and not isinstance(value, Mapping):
        counts = [value]
    elif key == "pattern" and isinstance(value, str):
        counts = [int(digits[:10]) for digits in re.findall(r"\d+", "".join(re.findall(r"\{[^}]*\}", value)))]
    for count in counts:
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_REPETITION:
            raise ValueError(f"This JSON schema cannot be enforced: {key} must be between 0 and {MAX_REPETITION}")
