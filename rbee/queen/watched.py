"""A host of the inventory: how the queen stands with its hive, and what of its report holds over a network."""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit

import msgspec

from rbee.client import Client
from rbee.errors import Unreachable
from rbee.inventory.fleet import Host
from rbee.wire.fleet import HiveReport, WorkerAccess, WorkerReport

ROUTED_FOR_S = 6.5
"""How long workers stay in routing after their hive's last answer.

A hive restarts in less, and its workers run on meanwhile. A job that is sent to a machine that is gone fails to connect
within 2 s, and goes to the next place.
"""


class HiveState(StrEnum):
    """How the queen stands with a hive of the inventory."""

    CONNECTING = "connecting"
    READY = "ready"
    UNREACHABLE = "unreachable"


class AnotherHive(Unreachable):
    """What answers there is not the hive that the inventory means."""


@dataclass
class Watched:
    """One host of the inventory and its hive.

    connecting ──heard──▶ ready ──missed──▶ unreachable ──heard──▶ ready
         └────────────────missed──────────────▲
    """

    host: Host
    url: str
    client: Client | None = None
    tls: ssl.SSLContext | None = None
    state: HiveState = HiveState.CONNECTING
    reason: str = ""
    since: float = field(default_factory=time.time)
    heard_at: float = float("-inf")

    def heard(self) -> None:
        """Note an answer."""
        self.heard_at = time.monotonic()
        if self.state is not HiveState.READY:
            self.state, self.reason, self.since = HiveState.READY, "", time.time()

    def missed(self, reason: str) -> None:
        """Note that no answer can be had at present."""
        self.reason = reason
        if self.state is not HiveState.UNREACHABLE:
            self.state, self.since = HiveState.UNREACHABLE, time.time()

    @property
    def silent_s(self) -> float:
        """Return for how long nothing was heard of it."""
        return time.monotonic() - self.heard_at

    @property
    def in_doubt(self) -> bool:
        """Return True while a hive that was ready does not answer, but not for so long that it counts."""
        return self.state is HiveState.READY and self.silent_s < ROUTED_FOR_S

    @property
    def away(self) -> bool:
        """Return True when nothing should be sent to this host's workers."""
        return self.state is HiveState.UNREACHABLE and time.monotonic() - self.heard_at > ROUTED_FOR_S

    def told(self, report: HiveReport) -> HiveReport:
        """Return a report as it holds here. Raises: AnotherHive when another than the declared one wrote it.

        A hive knows its own ports, but not the name under which it is reached; engines listen on its machine only.
        """
        if report.hive != self.host.name:
            raise AnotherHive(
                f"The hive at {self.url} calls itself {report.hive!r}, but {self.host.at} calls it {self.host.name!r}",
                hint=f"the HostName of {self.host.name}, or rbee apply",
            )
        workers = [self._told(worker) for worker in report.workers]
        return msgspec.structs.replace(report, url=self.url, workers=workers)

    def _told(self, worker: WorkerReport) -> WorkerReport:
        if worker.access is None:
            return worker
        access = WorkerAccess(url=self._dialled(worker.access.url), token=worker.access.token)
        return msgspec.structs.replace(worker, access=access)

    def _dialled(self, url: str) -> str:
        """Return where a worker is reached from here; always by TLS, because its token goes over a network."""
        return https_url(self.host.hostname, urlsplit(url).port or 443)


def https_url(hostname: str, port: int) -> str:
    """Return the address of a port of a host; `hostname` may be an IPv6 address."""
    return f"https://[{hostname}]:{port}" if ":" in hostname else f"https://{hostname}:{port}"
