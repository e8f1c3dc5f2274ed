"""What the controller hands to the engine: a wave of plans, its canary first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from rbee.apply.plan import HostPlan
from rbee.inventory.fleet import Host


class Member(Struct, frozen=True, kw_only=True):
    """One host and its plan."""

    host: Host
    plan: HostPlan


class Batch(Struct, frozen=True, kw_only=True):
    """Hosts of one wave, in order. `holders` are hosts that models may be copied from.

    One without members only names hosts, as `holders`, that are likely to be members of the next.
    """

    ssh_config: str
    sockets: str
    connect_limit_s: int
    members: list[Member]
    holders: list[Host] = []


def encode(batch: Batch) -> bytes:
    """Return a batch as one line of JSON."""
    return msgspec.json.encode(batch, enc_hook=str) + b"\n"


def decode(line: bytes) -> Batch:
    """Return the batch in a line."""
    return msgspec.json.decode(line, type=Batch, dec_hook=_path)


def _path(type_: type[Any], value: Any) -> Any:
    assert type_ is Path
    return Path(value)
