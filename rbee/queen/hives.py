"""A hive and its workers as the queen knows them, and as they may be shown."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from rbee.client import Client
from rbee.http.upstream import Upstream
from rbee.inventory.fleet import Host
from rbee.queen.ejection import Ejection
from rbee.queen.watched import HiveState, Watched
from rbee.wire.fleet import HiveReport, HiveView, WorkerReport, WorkerState

if TYPE_CHECKING:
    from rbee.queen.job import Job

HEARTBEAT_S = 30.0
LOST_AFTER_S = 3 * HEARTBEAT_S

DIRECT_PATHS = frozenset({"/v1/embeddings", "/v1/rerank", "/v1/messages/count_tokens"})
"""Endpoints whose whole answers need nothing of the worker's front."""

COMPLETED_STREAMS = frozenset({"/v1/responses", "/v1/messages"})
"""Endpoints whose streams an engine leaves incomplete."""


@dataclass
class Worker:
    """A worker that reported itself, and the queen's own count of what it is doing."""

    hive: str
    report: WorkerReport
    front: Upstream
    engine: Upstream
    in_flight: int = 0
    elsewhere: int = 0
    """How many of those are other processes' jobs."""
    lost: bool = False
    ttft_ms: float = 0.0
    tokens_per_second: float = 0.0
    unanswered: dict[str, Job] = field(default_factory=dict)
    """The jobs there of whose answers nothing has come, the oldest first."""
    reached_at: float = float("-inf")
    """When it was last found out whether its machine can be reached (time.monotonic())."""
    tokens_written: int = 0
    """All that came from it: of a stream, each event counts as a token."""
    ejection: Ejection = field(default_factory=Ejection)
    upstream_model: str = ""
    """The model's name there, when it is another."""
    look: Callable[[], None] | None = None
    """Has somebody find out how it stands: of servers that no hive reports."""

    @property
    def id(self) -> str:
        """Return `hive/name`, unique in the fleet."""
        return f"{self.hive}/{self.report.name}"

    def count_elsewhere(self, jobs: int) -> None:
        """Count the jobs that other processes have there among those in flight."""
        self.in_flight += jobs - self.elsewhere
        self.elsewhere = jobs

    @property
    def ready(self) -> bool:
        """Return True when it takes jobs."""
        return self.report.state is WorkerState.READY and not self.lost

    def upstream(self, path: str, *, stream: bool) -> Upstream:
        """Return the shortest way to an answer that has its API's shape and is cancelled when its client leaves.

        A stream comes from the engine as it is; whole answers, and streams that an engine leaves incomplete, are
        completed by the worker's front, which also frees a slot at once where an engine would finish for nobody.
        """
        if self.engine is self.front:
            return self.front
        direct = path in DIRECT_PATHS or (stream and path not in COMPLETED_STREAMS)
        return self.engine if direct else self.front


@dataclass
class Hive:
    """One hive: its last report, when it came, and how to reach it; `watched` when the inventory has it.

    `serves` is set of those that are none: the servers of a host of the inventory, which nobody reports.
    """

    report: HiveReport
    client: Client
    seen_at: float
    watched: Watched | None = None
    workers: dict[str, Worker] = field(default_factory=dict)
    serves: Host | None = None

    @property
    def host(self) -> Host | None:
        """Return its machine's lines in the inventory, if it has any."""
        return self.watched.host if self.watched else self.serves

    @property
    def lost(self) -> bool:
        """Return True when its heartbeats have stopped."""
        if self.serves is not None:
            return False
        if self.watched is not None:
            return self.watched.state is HiveState.UNREACHABLE
        return time.monotonic() - self.seen_at > LOST_AFTER_S

    @property
    def away(self) -> bool:
        """Return True when no job should be sent there."""
        return self.watched is not None and self.watched.away


def view(hive: Hive) -> HiveView:
    """Return a hive as it may be shown: without tokens."""
    report = hive.report
    return HiveView(
        hive=report.hive,
        url=report.url,
        version=report.version,
        state=str(hive.watched.state) if hive.watched else "lost" if hive.lost else "ready",
        last_report_s=round(time.monotonic() - hive.seen_at, 3),
        **_standing(hive.watched),
        devices=report.devices,
        engines=report.engines,
        models=report.models,
        workers=[msgspec.structs.replace(worker, access=None) for worker in report.workers],
    )


def view_of_servers(group: Hive, host: HiveView | None) -> HiveView:
    """Return the view of a host with its servers; `host` is what else is known of it."""
    workers = [worker.report for worker in group.workers.values()]
    if host is not None:
        return msgspec.structs.replace(host, workers=[*host.workers, *workers])
    answers = any(worker.ready for worker in group.workers.values())
    region, tags = (group.serves.region, group.serves.tags) if group.serves else ("", [])
    return HiveView(
        hive=group.report.hive,
        url="",
        version="",
        state="ready" if answers else "unreachable",
        reason="" if answers else "None of its servers answers",
        last_report_s=-1.0,
        region=region,
        tags=tags,
        models=group.report.models,
        workers=workers,
    )


def view_of_silent(watched: Watched) -> HiveView:
    """Return the view of a host that has never reported."""
    return HiveView(
        hive=watched.host.name,
        url=watched.url,
        version="",
        state=str(watched.state),
        last_report_s=-1.0,
        **_standing(watched),
    )


def _standing(watched: Watched | None) -> dict[str, Any]:
    if watched is None:
        return {}
    host = watched.host
    return {"reason": watched.reason, "since": watched.since, "region": host.region, "tags": host.tags}
