"""The places of a kind of job as a routing script sees them, kept between decisions.

Making a record anew for each of a thousand workers would take longer than the decision itself, and between two
decisions little changes: so a record is made again only when a fact of its place is another.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from gevent.event import Event

from rbee.inventory.fleet import Host
from rbee.queen.fleet import Fleet
from rbee.queen.hardware import hardware
from rbee.queen.hives import Hive
from rbee.queen.job import TYPES
from rbee.queen.places import Candidate
from rbee.queen.script import Frozen, freeze

FRESH_S = 0.25
"""How long a view is used although a hive may have gone out of reach, which nothing announces."""


class Query(NamedTuple):
    """What decides where a job can run."""

    model: str
    capability: str
    needs: frozenset[str] = frozenset()
    hive: str | None = None
    region: str = ""
    tenant: str = ""


class Place(NamedTuple):
    """A candidate and what its machine is known by."""

    candidate: Candidate
    hive: Hive | None
    host: Host | None


Known = tuple[object, ...]
Counts = tuple[int, float, float, float]
IDLE: Counts = (0, 0.0, 0.0, 0.0)


class View:
    """The places where jobs of one query may run.

    What a report says of a place holds as long as the view: every report makes the fleet announce a change, and then
    a new view is made. Only the queen's own counts change in between.
    """

    def __init__(self, query: Query, places: Sequence[Place], changed: Event, before: View | None = None) -> None:
        self.query = query
        self.places = [place.candidate for place in places]
        self._places = places
        self._changed = changed
        self._made_at = time.monotonic()
        self._workers = [place.worker for place in self.places]
        self._running = [worker for worker in self._workers if worker is not None]
        self._told: list[Known] = [_told(place) for place in places]
        older = before.known if before else {}
        kind = TYPES.get(query.capability, query.capability)
        self._facts: list[dict[str, object]] = []
        self._counts: list[Counts | None] = []
        self._records: list[Mapping[str, object]] = []
        for place, told in zip(places, self._told, strict=True):
            same = older.get(place.candidate.id)
            if same is not None and same[0] == told:
                _, facts, counts, found = same
            else:
                facts, counts, found = record(place, kind), None, {}
            self._facts.append(facts)
            self._counts.append(counts)
            self._records.append(found)
        self._frozen: Frozen | None = None

    @property
    def known(self) -> dict[str, tuple[Known, dict[str, object], Counts | None, Mapping[str, object]]]:
        """Return what a newer view can take over, by the places' ids."""
        ids = (place.id for place in self.places)
        return dict(zip(ids, zip(self._told, self._facts, self._counts, self._records, strict=True), strict=True))

    def without(self, failed: Collection[str]) -> View | None:
        """Return the view without the workers that failed a job already, or None where no place is left."""
        left = [place for place in self._places if place.candidate.id not in failed]
        return View(self.query, left, self._changed, self) if left else None

    def fresh(self, fleet: Fleet) -> bool:
        """Return True while the fleet has not announced anything since, and no worker was lost."""
        if self._changed is not fleet.changed or time.monotonic() - self._made_at > FRESH_S:
            return False
        return not any(worker.lost for worker in self._running)

    def frozen(self, prefixes: Mapping[str, float] = {}) -> Frozen:
        """Return the records of all places. `prefixes` says by worker's id how much of the prompt it has cached."""
        changed = []
        known = self._counts
        for index, worker in enumerate(self._workers):
            share = prefixes.get(worker.id, 0.0) if prefixes and worker is not None else 0.0
            now = IDLE if worker is None else (worker.in_flight, worker.ttft_ms, worker.tokens_per_second, share)
            if now != known[index]:
                known[index] = now
                self._records[index] = counted(self._facts[index], *now)
                changed.append(index)
        frozen = self._frozen
        if frozen is None or changed:
            frozen = self._frozen = freeze(self._records)
            for index in changed:
                self._records[index] = frozen[index]
        return frozen


def _told(place: Place) -> Known:
    """Return what the facts of a place are made of; two equal ones make equal facts."""
    worker, hive = place.candidate.worker, place.hive
    return place.candidate, worker and worker.report, worker and worker.ready, hive and hive.report, place.host


def record(place: Place, kind: str) -> dict[str, object]:
    """Return what a routing script may know of a place; `kind` is the type of the job."""
    candidate, host = place.candidate, place.host
    worker = candidate.worker
    line = next((line for line in host.workers if worker and line.name == worker.report.name), None) if host else None
    devices = place.hive.report.devices if place.hive else ()
    found = hardware(candidate.device, devices, host.gpus if host else (), line.gpus if line else ())
    facts: dict[str, object] = {
        "id": candidate.id,
        "hive": candidate.hive,
        "model": candidate.model.name,
        "backend": candidate.device,
        "engine": candidate.engine.name,
        "capability": kind,
        "gpu_type": found.gpu_type,
        "gpus": found.gpus,
        "vram_total": found.vram_total,
        "vram_free": found.vram_free,
        "slots": worker.report.slots if worker else 1,
        "in_flight": 0,
        "queue": 0,
        "load": 0.0,
        "tokens_per_second": 0.0,
        "ttft_ms": 0.0,
        "loaded": bool(worker and worker.ready),
        "state": str(worker.report.state) if worker else "stopped",
        "region": candidate.region,
        "tags": list(candidate.tags),
        "price": host.price if host else 0.0,
        "prefix_match": 0.0,
    }
    if worker is None:
        return facts
    return counted(facts, worker.in_flight, worker.ttft_ms, worker.tokens_per_second, 0.0)


def counted(
    facts: Mapping[str, Any], in_flight: int, ttft_ms: float, tokens_per_second: float, prefix_match: float
) -> dict[str, object]:
    """Return a place's record with the queen's own counts in it."""
    slots: int = facts["slots"]
    changed = dict(facts)
    changed["in_flight"] = in_flight
    changed["queue"] = max(0, in_flight - slots)
    changed["load"] = in_flight / max(1, slots)
    changed["tokens_per_second"] = tokens_per_second
    changed["ttft_ms"] = ttft_ms
    changed["prefix_match"] = prefix_match
    return changed
