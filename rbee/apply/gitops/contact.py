"""Notice that a host is back, long before its next attempt: whether something accepts on its ssh port."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rbee.errors import RbeeError

PROBE_EVERY_S = 10.0
PROBE_LIMIT_S = 2.0
MOST_AT_ONCE = 32
Probe = Callable[[tuple[str, int]], bool]


def accepts(address: tuple[str, int]) -> bool:
    """Tell whether a TCP connection can be made."""
    try:
        socket.create_connection(address, PROBE_LIMIT_S).close()
    except OSError:
        return False
    return True


class Contact:
    """Which unreachable hosts can be reached again. Behind a jump host none seems so: those wait for their time."""

    def __init__(self, probe: Probe = accepts, every_s: float = PROBE_EVERY_S) -> None:
        self._probe, self._every_s = probe, every_s
        self._at = 0.0
        self._reached: set[str] = set()

    def newly_reached(self, away: Iterable[str], inventory: Path, now: float) -> list[str]:
        """Return those of the hosts that accept connections and did not at the last look.

        A host that accepts but cannot be worked on is told once, so that it does not outrun its own back-off.
        """
        names = set(away)
        self._reached &= names
        if not names or 0 <= now - self._at < self._every_s:
            return []
        self._at = now
        addresses = {name: address for name, address in _addresses(inventory).items() if name in names}
        if not addresses:
            return []
        with ThreadPoolExecutor(max_workers=min(MOST_AT_ONCE, len(addresses))) as pool:
            answers = dict(zip(addresses, pool.map(self._probe, addresses.values()), strict=True))
        reached = {name for name, answer in answers.items() if answer}
        fresh = sorted(reached - self._reached)
        self._reached = reached
        return fresh


def _addresses(inventory: Path) -> dict[str, tuple[str, int]]:
    from rbee.inventory import read

    with contextlib.suppress(RbeeError, OSError):
        return {host.name: (host.hostname, host.port) for host in read(inventory).hosts}
    return {}
