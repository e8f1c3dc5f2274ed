"""Ask the routing script which of the places that can run a job should."""

from __future__ import annotations

import time

import gevent
from gevent.event import Event

from rbee.errors import Busy, NotFound, NotSupported, UnknownModel
from rbee.queen.fleet import Fleet
from rbee.queen.job import Job
from rbee.queen.places import Candidate
from rbee.queen.script import RoutingScript


class Routing:
    """Ranks the places for a job; waits, bounded, while the script chooses none."""

    def __init__(self, fleet: Fleet, script: RoutingScript, *, choice_timeout_s: float) -> None:
        self._fleet = fleet
        self._script = script
        self._timeout_s = choice_timeout_s

    def rank(self, job: Job) -> list[Candidate]:
        """Return the chosen places, the first choice first.

        Raises: UnknownModel, NotSupported, ClientGone, Busy when no place can be reached or was chosen in time.
        """
        deadline = time.monotonic() + self._timeout_s
        while True:
            changed = self._fleet.changed
            places = self._places(job)
            if places:
                chosen = self._script.rank(job.record(), [record(place) for place in places])
                if chosen:
                    return [places[index] for index in chosen]
            self._wait(job, changed, deadline - time.monotonic())

    def _places(self, job: Job) -> list[Candidate]:
        request = job.request
        try:
            return self._fleet.candidates(request.model, request.capability, request.needs(), job.hive_wish)
        except (UnknownModel, NotSupported, NotFound, Busy):
            if self._fleet.settled:
                raise
            return []

    def _wait(self, job: Job, changed: Event, left_s: float) -> None:
        if left_s <= 0:
            raise Busy(
                f"The routing script chose no worker for this job within {self._timeout_s:g} s",
                retry_after_s=5,
                hint=f"the conditions in {self._script.source}",
            )
        gevent.wait([changed, job.client.gone], timeout=min(left_s, 1.0), count=1)
        job.client.check()


def record(place: Candidate) -> dict[str, object]:
    """Return what a routing script may know of a place."""
    worker, model = place.worker, place.model
    slots = worker.report.slots if worker else 1
    in_flight = worker.in_flight if worker else 0
    return {
        "id": place.id,
        "hive": place.hive,
        "model": model.name,
        "backend": place.device,
        "engine": place.engine.name,
        "capability": (model.capabilities or place.engine.capabilities or [""])[0],
        "gpu_type": "",
        "gpus": 0 if place.device == "cpu" else 1,
        "vram_total": 0,
        "vram_free": 0,
        "slots": slots,
        "in_flight": in_flight,
        "queue": max(0, in_flight - slots),
        "load": in_flight / max(1, slots),
        "tokens_per_second": 0.0,
        "ttft_ms": worker.ttft_ms if worker else 0.0,
        "loaded": bool(worker and worker.ready),
        "state": str(worker.report.state) if worker else "stopped",
        "region": place.region,
        "tags": list(place.tags),
        "price": 0.0,
        "prefix_match": 0.0,
    }
