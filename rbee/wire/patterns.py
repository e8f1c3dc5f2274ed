"""Schemas, patterns and grammars of a request: what an engine compiles, refused where it could fall over them.

Engines turn a schema into a grammar. One that is nested without end, a pattern that repeats its own repeats, or a
count of a million makes some of them hang, grow without bound or abort; every other job of the worker goes with them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rbee.errors import InvalidRequest

MAX_DEPTH = 64
MAX_NODES = 20_000
MAX_PATTERN_CHARS = 1024
MAX_REPEATS = 10_000
"""How many copies of its smallest part the counts of a pattern may come to."""
ATOM = re.compile(r"\\(?:[pP]\{[^}]*\}|u\{[^}]*\}|k<[^>]*>|.)|\[\^?\]?(?:\\.|[^\]\\])*\]|[^()|]", re.DOTALL)
OPENING = re.compile(r"\((?:\?(?::|=|!|<=|<!|P?<[^>]*>|[a-zA-Z]+[:)]))?")
TIMES = re.compile(r"(?:([*+?])|\{(\d*)(,?)(\d*)\})[?+]?")


@dataclass
class Group:
    """What stands between two parentheses, or at the top: of the branch being read, and of all of them."""

    fixed: bool = False
    """The branch has a part that is there exactly so often as it is written: it keeps repeats apart."""
    endless: bool = False
    """The branch has a part that may repeat without bound."""
    loose: bool = False
    """A branch is nothing but repeats: text can be divided among them in ever so many ways."""
    copies: int = 1

    def end_branch(self) -> None:
        """Note what the branch was, and begin the next one."""
        self.loose = self.loose or (self.endless and not self.fixed)
        self.fixed = self.endless = False


def check_schema(schema: object, where: str) -> None:
    """Refuse a JSON Schema that is too large or too deep, or has a pattern that explodes. Raises: InvalidRequest."""
    waiting, nodes = [(schema, 1)], 0
    while waiting:
        value, depth = waiting.pop()
        nodes += 1
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"{where} is nested more than {MAX_DEPTH} deep", param=where)
        if nodes > MAX_NODES:
            raise InvalidRequest(f"{where} has more than {MAX_NODES} parts", param=where)
        if isinstance(value, dict):
            pattern = value.get("pattern")
            if isinstance(pattern, str):
                check_pattern(pattern, where)
            waiting += [(part, depth + 1) for part in value.values() if isinstance(part, (dict, list))]
        elif isinstance(value, list):
            waiting += [(part, depth + 1) for part in value if isinstance(part, (dict, list))]


def check_pattern(pattern: str, where: str) -> None:
    """Refuse a regular expression (ECMA-262, as JSON Schema has it) that explodes. Raises: InvalidRequest."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise InvalidRequest(f"A pattern in {where} is longer than {MAX_PATTERN_CHARS} characters", param=where)
    groups, at = [Group()], 0
    while at < len(pattern):
        char, group = pattern[at], groups[-1]
        if char == "(":
            opening = OPENING.match(pattern, at)
            at = opening.end() if opening else at + 1
            groups.append(Group())
            continue
        if char == "|":
            group.end_branch()
            at += 1
            continue
        inner = None
        if char == ")":
            at += 1
            if len(groups) == 1:
                continue
            inner = groups.pop()
            inner.end_branch()
        else:
            atom = ATOM.match(pattern, at)
            at = atom.end() if atom else at + 1
        at = _repeat(pattern, at, groups[-1], inner, where)


def _repeat(pattern: str, at: int, group: Group, inner: Group | None, where: str) -> int:
    """Take how often the part that ends here repeats into its group, and return where it ends."""
    times = TIMES.match(pattern, at)
    copies, endless = inner.copies if inner else 1, False
    if times is None:
        group.fixed = group.fixed or inner is None or not inner.loose
    else:
        at = times.end()
        word, low, comma, high = times.groups()
        endless = word in ("*", "+") or bool(comma and not high)
        most = max((int(number) for number in (low, high) if number), default=1)
        copies *= max(most, 1)
        group.fixed = group.fixed or not (endless or word == "?" or (low in ("", "0") and not word) or inner)
    if endless and inner is not None and inner.loose:
        raise InvalidRequest(f"A pattern in {where} repeats its own repeats: {pattern[:80]!r}", param=where)
    group.endless = group.endless or endless or (inner is not None and inner.loose)
    group.copies = max(group.copies, copies)
    if group.copies > MAX_REPEATS:
        raise InvalidRequest(f"A pattern in {where} repeats a part more than {MAX_REPEATS} times", param=where)
    return at


def check_grammar(grammar: str, where: str) -> None:
    """Refuse a grammar in another language than GBNF: llama.cpp aborts at them. Raises: InvalidRequest."""
    if "%llguidance" in grammar:
        raise InvalidRequest(f"{where} must be a GBNF grammar; %llguidance is not supported", param=where)
