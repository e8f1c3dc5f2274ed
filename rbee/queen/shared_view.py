"""What processes and queens tell each other all the time: what they are doing, and which workers fail.

Each says so on one channel of the shared state, at most ten times a second when something has changed and once a second
anyhow, so whoever is not heard for three seconds is gone. What a job needs is never asked for there: it is what was
heard last.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import gevent
import msgspec
from msgspec import Struct

from rbee.queen.capacity import Capacity
from rbee.queen.fleet import Fleet
from rbee.queen.hives import Worker
from rbee.queen.link import FAILURES, Link
from rbee.queen.owners import Owner
from rbee.queen.queueing import UNBOUNDED, Queues

log = logging.getLogger("rbee.queen.state")

CHANNEL = "rbee:news"
TELL_EVERY_S = 0.1
BEAT_S = 1.0
LEASE_S = 3.0
PAUSE_S = 0.5


class Doing(Struct, frozen=True, tag="doing", omit_defaults=True):
    """What one process is doing: its jobs by worker, and by model those that run and those that wait."""

    process: str
    queen: str
    slot: int
    url: str = ""
    workers: dict[str, int] = {}
    models: dict[str, tuple[int, int]] = {}


class Exclusion(Struct, frozen=True, tag="ejection"):
    """What happened to a worker, in the words of `ejection.Ejection`."""

    process: str
    worker: str
    event: str
    pause_s: float = 0.0


_decoder = msgspec.json.Decoder(Doing | Exclusion)
_encode = msgspec.json.encode


@dataclass
class Other:
    """Another process: what it said last, when (monotonic), and what of it concerns workers that are known here too."""

    doing: Doing
    heard_at: float
    models: dict[str, tuple[int, int]]


@dataclass
class SharedView:
    """What the other processes are doing, and what this one tells them."""

    own: Owner
    process: str
    link: Link
    url: str
    fleet: Fleet
    met: Callable[[str, str], None]
    """Is told of each other queen that is heard, and of her address."""
    queues: Queues | None = None
    others: dict[str, Other] = field(default_factory=dict)
    companions: int = 1
    """How many processes there were when the state was last reached."""
    _told: Doing | None = None
    _told_at: float = 0.0

    def run(self) -> NoReturn:
        """Tell for ever what this process is doing."""
        while True:
            gevent.sleep(TELL_EVERY_S)
            if self.link.up:
                self._tell()
                self._drop_silent()

    def listen(self) -> NoReturn:
        """Hear for ever what the others tell."""
        while True:
            try:
                self._listen()
            except FAILURES as problem:
                log.debug("the news: %s", problem)
            except Exception:
                log.exception("the news of the other processes")
            gevent.sleep(PAUSE_S)

    def forget(self) -> None:
        """Go on alone: what the others do cannot be known any more, only how many they were."""
        self.companions = 1 + len(self.others)
        for name in list(self.others):
            self._put(name, None)

    def tell_ejection(self, worker: str, event: str, pause_s: float) -> None:
        """Have the others know what happened to a worker."""
        self.link.send(("PUBLISH", CHANNEL, _encode(Exclusion(self.process, worker, event, pause_s))))

    def demands(self, model: str) -> dict[str, int]:
        """Return how many jobs of a model run or wait at each other process."""
        found = ((name, other.models.get(model)) for name, other in self.others.items())
        return {name: sum(counts) for name, counts in found if counts}

    def waiting(self, model: str) -> int:
        """Return how many jobs of a model wait at the other processes."""
        return sum(other.models.get(model, (0, 0))[1] for other in self.others.values())

    def doing(self) -> Doing:
        """Return what this process is doing."""
        at_worker = {worker.id: worker.in_flight - worker.elsewhere for worker in _workers(self.fleet)}
        return Doing(
            self.process,
            self.own.queen,
            self.own.slot,
            self.url,
            {name: count for name, count in at_worker.items() if count},
            self.queues.demands() if self.queues is not None else {},
        )

    def hear(self, data: bytes) -> None:
        """Take what a process said. Raises: msgspec.DecodeError."""
        news = _decoder.decode(data)
        if news.process == self.process:
            return
        if isinstance(news, Doing):
            if news.queen != self.own.queen:
                self.met(news.queen, news.url)
            self._put(news.process, news)
        else:
            worker = self.fleet.worker(news.worker)
            if worker is not None:
                worker.ejection.hear(news.event, news.pause_s)

    def _tell(self) -> None:
        now, doing = time.monotonic(), self.doing()
        if doing != self._told or now - self._told_at >= BEAT_S:
            self._told, self._told_at = doing, now
            self.link.send(("PUBLISH", CHANNEL, _encode(doing)))

    def _listen(self) -> None:
        client = self.link.client()
        news = client.pubsub(ignore_subscribe_messages=True)
        try:
            news.subscribe(CHANNEL)
            heard_at = time.monotonic()
            # This process hears itself, too: a silence is none of the others'.
            while time.monotonic() - heard_at < LEASE_S or not self.link.up:
                message = news.get_message(timeout=BEAT_S)
                if message is not None:
                    heard_at = time.monotonic()
                    self._hear(message["data"])
        finally:
            news.close()
            client.close()

    def _hear(self, data: bytes) -> None:
        try:
            self.hear(data)
        except msgspec.DecodeError as problem:
            log.warning("news of another version of rbee: %s", problem)

    def _common(self, doing: Doing) -> dict[str, tuple[int, int]]:
        """Return what of a process' doing takes slots that this one may use: a queen may have machines of her own."""
        if doing.queen == self.own.queen:
            return doing.models
        known = (self.fleet.worker(worker_id) for worker_id in doing.workers)
        used = {worker.report.model for worker in known if worker is not None}
        return {model: counts for model, counts in doing.models.items() if model in used or not counts[0]}

    def _drop_silent(self) -> None:
        before = time.monotonic() - LEASE_S
        for name in [name for name, other in self.others.items() if other.heard_at < before]:
            self._put(name, None)

    def _put(self, name: str, doing: Doing | None) -> None:
        """Count what a process does now in the place of what it did before; None: it is gone."""
        before = self.others.pop(name, None)
        if doing is not None:
            self.others[name] = Other(doing, time.monotonic(), self._common(doing))
        changed = {*(before.doing.workers if before else ()), *(doing.workers if doing else ())}
        for worker_id in changed:
            worker = self.fleet.worker(worker_id)
            if worker is not None:
                worker.count_elsewhere(sum(other.doing.workers.get(worker_id, 0) for other in self.others.values()))
        if self.queues is not None:
            self.queues.grant_all()


class SharedCapacity(Capacity):
    """Counts slots; of a model that more want than there are slots for, each process takes its share."""

    view: SharedView

    def slots(self, model: str) -> int:
        total = super().slots(model)
        if total >= UNBOUNDED:
            return total
        if not self.view.link.up:
            return max(1, total // self.view.companions)
        others = self.view.demands(model)
        if not others:
            return total
        queues = self.view.queues
        return share(total, self.view.process, {**others, self.view.process: queues.demand(model) if queues else 0})


def share(slots: int, own: str, demands: Mapping[str, int]) -> int:
    """Return how many of a model's slots are a process' own, at least 1.

    While they are enough for all, it is what the others leave. Else it is in proportion to the demands, rounded so that
    the shares of all, who know the same demands, are the slots together.
    """
    wanted = sum(demands.values())
    if wanted <= slots:
        return max(1, slots - wanted + demands[own])
    before = sum(demand for name, demand in demands.items() if name < own)
    upto = before + demands[own]
    return max(1, round(slots * upto / wanted) - round(slots * before / wanted))


def _workers(fleet: Fleet) -> Iterator[Worker]:
    for hive in fleet.hives.values():
        yield from hive.workers.values()
