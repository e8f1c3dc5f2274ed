"""What is remembered of applies: each host's states, which a rollback can bring back, and this machine's own log."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from rbee.errors import NotFound
from rbee.paths import private, state_dir

STAMP = "%Y%m%dT%H%M%SZ"
LOG_TAIL_BYTES = 4 * 1024 * 1024


class State(Struct, frozen=True, kw_only=True):
    """What an apply brought a host to. `name` is the same on all hosts of one apply, and sorts by time."""

    name: str
    revision: str
    at: str
    """When the apply began, by the clock of the machine that ran it (ISO 8601)."""


class Past(Struct, frozen=True, kw_only=True):
    """What a host remembers: its states, oldest first, and which apply touched it last."""

    states: list[str]
    last: str = ""
    """The state that the last apply was to bring, whether it came to that or not."""


def state_name(revision: str, now: datetime.datetime | None = None) -> str:
    """Return what the states of an apply that begins now are kept as."""
    moment = now or datetime.datetime.now(datetime.UTC)
    return f"{moment.strftime(STAMP)}-{revision}"


def state_of(name: str) -> State:
    """Return the parts of a state's name."""
    stamp, _, revision = name.partition("-")
    try:
        at = datetime.datetime.strptime(stamp, STAMP).replace(tzinfo=datetime.UTC).isoformat()
    except ValueError:
        return State(name=name, revision=name, at="")
    return State(name=name, revision=revision, at=at)


def past_of(told: Mapping[str, Any]) -> Past:
    """Return what the agent's `history` says."""
    states = sorted(told["states"])
    last = str(told["audit"][-1].get("state", "")) if told["audit"] else ""
    return Past(states=states, last=last or (states[-1] if states else ""))


def states_before(pasts: Mapping[str, Past]) -> dict[str, str]:
    """Return the state of each host before the last apply; a host that it did not touch is not named.

    Where that apply failed, it is the last state that the host did come to; where there is none, it is empty.
    """
    last = max((past.last for past in pasts.values()), default="")
    touched = {host: past for host, past in pasts.items() if past.last == last}
    return {host: next((s for s in reversed(past.states) if s != last), "") for host, past in touched.items()}


def states_at(pasts: Mapping[str, Past], to: str) -> dict[str, str]:
    """Return each host's state of `to`: a state's name, a revision, or the beginning of one of them.

    Of several states of one revision a host's newest is meant. A host that no such apply changed has the state that
    it had at the first of them; one that had none then is not named. Raises: NotFound.
    """
    known = {name for past in pasts.values() for name in past.states}
    found = [name for name in known if to in (name, state_of(name).revision)]
    found = found or [name for name in known if name.startswith(to) or state_of(name).revision.startswith(to)]
    if not found or len({state_of(name).revision for name in found}) > 1:
        what = "Several states begin with" if found else "There is no state"
        raise NotFound(f"{what} {to!r}. There are:\n{listing(found or known)}", hint="one of these")
    own = {host: [name for name in past.states if name in found] for host, past in pasts.items()}
    before = {host: [name for name in past.states if name < min(found)] for host, past in pasts.items()}
    return {host: max(own[host] or before[host]) for host in pasts if own[host] or before[host]}


def listing(names: Iterable[str]) -> str:
    """Return states as lines for a person, newest first."""
    states = [state_of(name) for name in sorted(names, reverse=True)]
    return "\n".join(f"  {state.name}  {state.at}" for state in states) or "  none"


def log_path() -> Path:
    """Return this machine's own log of applies, one JSON object a line."""
    return state_dir() / "applies.jsonl"


def add_to_log(line: Mapping[str, Any]) -> None:
    """Add a line to this machine's own log."""
    private(state_dir())
    with log_path().open("ab") as file:
        file.write(json.dumps(line).encode() + b"\n")


def read_log(count: int) -> list[dict[str, Any]]:
    """Return the last lines of this machine's log, oldest first; a line that is damaged is passed over."""
    try:
        with log_path().open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - LOG_TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return [entry for entry in entries if isinstance(entry, dict)][-count:] if count else []
