"""How much of a model can run at once, read from the fleet; and how far a model is that is being loaded."""

from __future__ import annotations

from gevent.event import Event

from rbee.queen.fleet import Fleet
from rbee.queen.queueing import UNBOUNDED
from rbee.wire.fleet import WorkerState


class Capacity:
    """Counts slots; a count holds until the fleet changes."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._seen: Event | None = None
        self._slots: dict[str, int] = {}

    def slots(self, model: str) -> int:
        """Return how many jobs of a model its ready workers take at once.

        It is 1 for a model that is to be loaded, so that one job asks for it while the others can still be ordered, and
        unbounded for one that no machine has, so that routing refuses it at once.
        """
        if self._fleet.changed is not self._seen:
            self._seen = self._fleet.changed
            self._slots.clear()
        found = self._slots.get(model)
        if found is None:
            found = self._slots[model] = self._count(model)
            if len(self._slots) > 10_000:  # names come from clients
                self._slots.clear()
        return found

    def progress(self, model: str) -> float | None:
        """Return how far the start of a worker is, 0 to 1, or None when none starts."""
        starting = [
            worker.report.progress
            for hive in self._fleet.hives.values()
            for worker in hive.workers.values()
            if worker.report.model == model and worker.report.state is WorkerState.STARTING
        ]
        return max(starting, default=None)

    @property
    def changed(self) -> Event:
        """Return what is set at the next change of the fleet."""
        return self._fleet.changed

    def _count(self, model: str) -> int:
        known, slots = False, 0
        for hive in self._fleet.hives.values():
            if hive.away:
                continue
            known = known or any(found.name == model for found in hive.report.models)
            said = {line.name: line.slots for line in hive.serves.workers} if hive.serves else {}
            for worker in hive.workers.values():
                if worker.report.model == model and worker.ready:
                    # Of a server that is only an address, nobody knows more than its line in the inventory says.
                    of_worker = said.get(worker.report.name, worker.report.slots)
                    if not of_worker:
                        return UNBOUNDED
                    slots += of_worker
        return slots or (1 if known else UNBOUNDED)
