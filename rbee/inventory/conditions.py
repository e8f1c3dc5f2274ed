"""When a block of an ssh_config applies: `Host` patterns and `Match` criteria."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from msgspec import Struct

from rbee.inventory.fleet import At
from rbee.inventory.lexing import in_list, matches
from rbee.inventory.world import World

WITH_ARGUMENT = ("host", "originalhost", "user", "localuser", "exec", "tagged", "command", "sessiontype")
ALONE = ("all", "canonical", "final")
NOT_HERE = ("localnetwork", "version")
"""Criteria that hold for one network or one version of ssh, while an inventory means the same everywhere."""


class Criterion(Struct, frozen=True):
    """One word of a `Match` line, with its argument."""

    name: str
    argument: str = ""
    negated: bool = False


class Condition(Struct, frozen=True):
    """A `Host` line with its patterns, or a `Match` line with its criteria.

    `parent` is the number of the block whose `Include` led here, or -1.
    """

    number: int
    parent: int
    at: At
    patterns: tuple[str, ...] = ()
    criteria: tuple[Criterion, ...] = ()


class Known(Struct):
    """What a pass knows of a host so far: its name as given, the `target` of `Host` patterns, what lines have set."""

    name: str
    target: str
    hostname: str
    user: str
    port: str = "22"
    alias: str = ""
    tag: str = ""
    final: bool = False


def read_match(words: Sequence[str]) -> tuple[Criterion, ...]:
    """Return the criteria of a `Match` line. Raises: ValueError."""
    found: list[Criterion] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        negated = word.startswith("!")
        name, assigned, argument = word.removeprefix("!").partition("=")
        name = name.lower()
        if name in ALONE and not assigned:
            if name == "all" and (rest or len(found) > 1):
                raise ValueError("Match all stands alone")
        elif name in WITH_ARGUMENT:
            argument = argument if assigned else rest.pop(0) if rest else ""
            if not argument and name not in ("tagged", "command"):
                raise ValueError(f"Match {name} has no value")
        elif name in NOT_HERE:
            raise ValueError(f"Match {name} is nothing an inventory can depend on")
        else:
            raise ValueError(f"there is no Match {name!r}; there is {', '.join(ALONE + WITH_ARGUMENT)}")
        found.append(Criterion(name, argument, negated))
    if not found:
        raise ValueError("Match has no criterion")
    return tuple(found)


def host_applies(condition: Condition, target: str) -> bool:
    """Tell whether a `Host` line covers a name: a negated pattern that does decides alone."""
    found = False
    for pattern in condition.patterns:
        if pattern.startswith("!"):
            if matches(target, pattern[1:]):
                return False
        elif not found:
            found = matches(target, pattern)
    return found


def match_applies(condition: Condition, known: Known, world: World) -> bool:
    """Tell whether all criteria of a `Match` line hold. Raises: ValueError, TimeoutError (from `Match exec`)."""
    return all(_holds(criterion, known, world) for criterion in condition.criteria)


def _holds(criterion: Criterion, known: Known, world: World) -> bool:
    if criterion.name == "all":
        found = True
    elif criterion.name in ("canonical", "final"):
        found = known.final
    elif criterion.name == "exec":
        return (
            world.run is not None and world.run(expand(criterion.argument, tokens(known, world))) != criterion.negated
        )
    else:
        found = _matches(criterion, known, world)
    return found != criterion.negated


def _matches(criterion: Criterion, known: Known, world: World) -> bool:
    patterns = criterion.argument
    # Only host names are compared without regard to case.
    if criterion.name in ("host", "originalhost"):
        name = known.hostname if criterion.name == "host" else known.name
        return in_list(name.lower(), patterns.lower())
    text = {"user": known.user, "localuser": world.user, "tagged": known.tag, "sessiontype": "shell"}.get(
        criterion.name, ""
    )
    return in_list(text, patterns) if text else not patterns


def tokens(known: Known, world: World) -> Mapping[str, str]:
    """Return what the tokens of `Match exec` stand for (ssh_config(5), TOKENS)."""
    import hashlib

    connection = hashlib.sha1(
        (world.machine + known.hostname + known.port + known.user).encode(), usedforsecurity=False
    ).hexdigest()
    return {
        "%": "%",
        "C": connection,
        "L": world.machine.partition(".")[0],
        "d": world.home,
        "h": known.hostname,
        "i": str(world.user_id),
        "k": known.alias or known.hostname,
        "l": world.machine,
        "n": known.name,
        "p": known.port,
        "r": known.user,
        "u": world.user,
    }


def expand(text: str, values: Mapping[str, str]) -> str:
    """Return a text with its %-tokens replaced. Raises: ValueError for an unknown one."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise ValueError(f"%{found[1]} is no token here; a percent sign is written %%")
        return values[found[1]]

    return re.sub("%(.?)", value, text, flags=re.DOTALL)
