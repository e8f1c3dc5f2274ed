"""What the queen believes of its hives, models and workers; the hives' reports are the only source.

This machine's own hive pushes its reports here; those of the inventory's hosts are fetched (`watching`).
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
from gevent.event import Event

from rbee import paths
from rbee.client import Client
from rbee.errors import Busy, NotFound, RbeeError, UnknownModel
from rbee.http.upstream import Upstream
from rbee.queen.ejection import Ejection, spared
from rbee.queen.hives import Hive, Worker, view, view_of_servers, view_of_silent
from rbee.queen.places import Candidate, can, cannot, options
from rbee.queen.watched import HiveState, Watched
from rbee.wire.fleet import HiveReport, HiveView, ModelReport, WorkerAccess, WorkerReport, WorkerState

SAME_START_S = 0.05
SETTLE_S = 30.0
"""How long a hive that has just been met may take to list its engines."""


class Fleet:
    """The belief. `changed` is set and renewed at every report, so that those who wait can look again."""

    def __init__(self, path: Path, hive_token: str, *, expects_hive: bool = False) -> None:
        self.hives: dict[str, Hive] = {}
        self.watched: dict[str, Watched] = {}
        self.changed = Event()
        self.on_ejection: Callable[[str, str, float], None] = lambda worker, event, pause_s: None
        """Is given what other processes must know of a worker that fails (`Ejection.tell`), with its id."""
        self._expects_hive = expects_hive
        self._settles_by = time.monotonic() + SETTLE_S
        self._path = path
        self._token = hive_token

    @property
    def settled(self) -> bool:
        """Return False while a hive that has just started is still finding out what it has."""
        if time.monotonic() > self._settles_by:
            return True
        own = any(hive.watched is None and hive.serves is None for hive in self.hives.values())
        if any(worker.report.state is WorkerState.STARTING for g in self._groups() for worker in g.workers.values()):
            return False
        asked = all(watched.state is not HiveState.CONNECTING for watched in self.watched.values())
        listed = all(hive.report.engines or hive.away for hive in self.hives.values())
        return listed and asked and (own or not self._expects_hive)

    def learn(self, report: HiveReport) -> bool:
        """Take a report that a hive of this machine sent, unless a newer one, or a host of the inventory, is known.

        The inventory wins once its hive answers; until then a hive of the same name that runs here is of use.
        Return False for a report of an earlier run of the hive: it is late by far, or somebody has kept it.
        """
        hive, watched = self.hives.get(report.hive), self.watched.get(report.hive)
        if watched is not None and watched.state is HiveState.READY:
            return True
        if hive and not hive.watched and _order(report) < _order(hive.report):
            return report.epoch == hive.report.epoch
        if hive is None or hive.watched or hive.report.url != report.url:
            hive = self._meet(Hive(report, Client(report.url, token=self._token), 0.0))
            self._remember()
        self._take(hive, report)
        return True

    def hear(self, watched: Watched, report: HiveReport) -> None:
        """Take the answer of a hive of the inventory. Raises: Unreachable when it is not the hive that was meant."""
        report = watched.told(report)
        if self.watched.get(report.hive) is not watched or watched.client is None:
            return
        was, hive = watched.state, self.hives.get(report.hive)
        watched.heard()
        if hive is None or hive.watched is not watched:
            hive = self._meet(Hive(report, watched.client, 0.0, watched))
        elif report.epoch == hive.report.epoch and report.sequence < hive.report.sequence:
            return
        if hive.seen_at and _order(report) == _order(hive.report) and was is HiveState.READY:
            hive.seen_at = time.monotonic()
            return
        self._take(hive, report)

    def miss(self, watched: Watched, reason: str) -> None:
        """Note that a hive of the inventory does not answer, and why."""
        watched.missed(reason)
        self.announce()

    def watch(self, watched: Watched) -> None:
        """Take up a host of the inventory, in the place of an earlier one of its name."""
        self.watched[watched.host.name] = watched
        self._settles_by = time.monotonic() + SETTLE_S

    def unwatch(self, name: str) -> None:
        """Forget a host that the inventory has no more: no further job is sent there, those that run there end well."""
        self.watched.pop(name, None)
        hive = self.hives.get(name)
        if hive is not None and hive.watched is not None:
            del self.hives[name]
        self.announce()

    def look(self, name: str, *, timeout_s: float = 10.0) -> None:
        """Ask a hive for its state now. Raises: NotFound, Lost."""
        hive = self.hive(name)
        report = hive.client.get("/v1/hive", HiveReport, timeout_s=timeout_s)
        if hive.watched is None:
            self.learn(report)
        else:
            self.hear(hive.watched, report)

    def serve(self, group: Hive) -> None:
        """Take up the servers of a host of the inventory, in the place of those that it had."""
        self.hives[_key(group.report.hive)] = group
        self._settles_by = time.monotonic() + SETTLE_S
        self.announce()

    def unserve(self, name: str) -> None:
        """Forget the servers of a host; jobs that run there end well."""
        self.hives.pop(_key(name), None)
        self.announce()

    def has(self, worker: Worker) -> bool:
        """Return True while this very worker is what its hive reports under its name."""
        hive = self.hives.get(worker.hive)
        return hive is not None and hive.workers.get(worker.report.name) is worker

    def learn_worker(self, hive_name: str, report: WorkerReport) -> bool:
        """Take one worker's state at once, ahead of its hive's next report. Return False for an earlier worker's."""
        hive = self.hives.get(hive_name)
        if hive is None or hive.watched is not None:
            return True
        if (known := hive.workers.get(report.name)) and report.started_at < known.report.started_at:
            return False
        others = [worker for worker in hive.report.workers if worker.name != report.name]
        hive.report = msgspec.structs.replace(hive.report, workers=[*others, report])
        hive.workers = dict(self._workers(hive, hive.report))
        self.announce()
        return True

    def forget_unreachable(self, name: str) -> None:
        """Drop this machine's hive when it does not answer, until it reports again; others are watched anyway."""
        hive = self.hives.get(name)
        if hive is not None and hive.watched is None:
            del self.hives[name]
            self.announce()

    def recall(self) -> None:
        """Ask the hives that an earlier server process knew for their state."""
        try:
            urls = msgspec.json.decode(self._path.read_bytes(), type=dict[str, str])
        except (OSError, msgspec.DecodeError):
            return
        for name, url in urls.items():
            try:
                report = Client(url, token=self._token, timeout_s=2.0).get("/v1/hive", HiveReport)
            except RbeeError:
                continue
            if report.hive == name:
                self.learn(report)

    def hive(self, name: str) -> Hive:
        """Return the hive of this name. Raises: NotFound."""
        if name in self.hives and self.hives[name].serves is None:
            return self.hives[name]
        if any(group.report.hive == name for group in self._groups()) and name not in self.watched:
            raise NotFound(f"No hive runs on {name!r}, only servers that the inventory names by their address")
        if name in self.watched:
            raise _unreached([self.watched[name]], f"The hive {name!r} has not answered yet")
        known = ", ".join(sorted({*(h.report.hive for h in self.hives.values()), *self.watched})) or "none"
        raise NotFound(f"There is no hive {name!r}; known: {known}")

    def models(self) -> dict[str, ModelReport]:
        """Return every model of the hives that can be reached, by name."""
        # A hive, which knows more of a model than that it is there, has the last word.
        hives = sorted((hive for hive in self.hives.values() if not hive.away), key=lambda hive: hive.serves is None)
        return {model.name: model for hive in hives for model in hive.report.models if _there(hive, model)}

    def candidates(self, model: str, capability: str, features: set[str], wish: str | None) -> list[Candidate]:
        """Return where a job can run: the workers that have the model, else the hives that could start one.

        Raises: UnknownModel; NotSupported when the model is there but nothing can do this with it; Busy when it is
        only on machines that cannot be reached at present.
        """
        hives = self._wished(wish) if wish else list(self.hives.values())
        listed = [
            (hive, found) for hive in hives if not hive.away for found in hive.report.models if found.name == model
        ]
        if not listed:
            raise self._nowhere(model)
        able = [c for hive, found in listed for c in options(hive, found) if can(c, capability, features)]
        if not able:
            raise _silent(model, capability, [hive for hive, _ in listed]) or cannot(
                model, listed, capability, features
            )
        running = [candidate for candidate in able if candidate.worker]
        return spared(running) or able

    def views(self) -> list[HiveView]:
        """Return the belief as it may be shown: without tokens."""
        silent = [view_of_silent(watched) for name, watched in self.watched.items() if name not in self.hives]
        hives = [view(hive) for hive in self.hives.values() if hive.serves is None]
        shown = {one.hive: one for one in [*hives, *silent]}
        for group in self._groups():
            shown[group.report.hive] = view_of_servers(group, shown.get(group.report.hive))
        return [one for _, one in sorted(shown.items())]

    def _groups(self) -> list[Hive]:
        return [hive for hive in self.hives.values() if hive.serves is not None]

    def _wished(self, name: str) -> list[Hive]:
        """Return the hive of this name and the servers of its host. Raises: NotFound."""
        return [hive for hive in self.hives.values() if hive.report.hive == name] or [self.hive(name)]

    def _nowhere(self, model: str) -> RbeeError:
        """Return why no machine has a model: it is on one that is away, or it is not known at all."""
        away = [
            watched
            for name, watched in self.watched.items()
            if (watched.away and _listed(self.hives.get(name), model)) or _declared(watched, model)
        ]
        if away:
            return _unreached(away, f"No machine that has the model {model!r} can be reached")
        names = sorted(self.models())
        return UnknownModel(model, difflib.get_close_matches(model, names, n=3, cutoff=0.5), names)

    def _meet(self, hive: Hive) -> Hive:
        self.hives[hive.report.hive] = hive
        return hive

    def _take(self, hive: Hive, report: HiveReport) -> None:
        if not hive.seen_at or report.epoch != hive.report.epoch:
            # It has just started, and lists its engines a moment later.
            self._settles_by = time.monotonic() + SETTLE_S
        hive.workers = dict(self._workers(hive, report))
        hive.report, hive.seen_at = report, time.monotonic()
        self.announce()

    def _workers(self, hive: Hive, report: HiveReport) -> Iterator[tuple[str, Worker]]:
        tls = hive.watched.tls if hive.watched else None
        for told in report.workers:
            access = told.access or WorkerAccess(url="")
            worker = hive.workers.get(told.name)
            if worker is None or not _same(worker.report, told):
                front = Upstream(access.url, token=access.token, tls=tls)
                engine = Upstream(access.engine_url, token=access.token) if access.engine_url else front
                ejection = self.ejection(report.hive, told.name)
                yield told.name, Worker(report.hive, told, front, engine, ejection=ejection)
            else:
                worker.report = told
                yield told.name, worker

    def ejection(self, hive: str, name: str) -> Ejection:
        """Return the part of a new worker that knows how its jobs end."""
        worker_id = f"{hive}/{name}"
        return Ejection(self.announce, tell=lambda event, pause_s: self.on_ejection(worker_id, event, pause_s))

    def worker(self, worker_id: str) -> Worker | None:
        """Return the worker of this id, if there is one."""
        hive, _, name = worker_id.partition("/")
        places = (self.hives.get(hive), self.hives.get(_key(hive)))
        return next((place.workers[name] for place in places if place is not None and name in place.workers), None)

    def has_other(self, worker: Worker) -> bool:
        """Return True when another worker is ready that has the same model."""
        model = worker.report.model
        others = (one for hive in self.hives.values() if not hive.away for one in hive.workers.values())
        return any(one.ready and one is not worker and one.report.model == model for one in others)

    def announce(self) -> None:
        """Wake those who wait for something to change."""
        changed, self.changed = self.changed, Event()
        changed.set()

    def _remember(self) -> None:
        own = {name: hive for name, hive in self.hives.items() if hive.watched is None and hive.serves is None}
        urls = {name: hive.report.url for name, hive in own.items()}
        paths.write_private(self._path, msgspec.json.encode(urls))


def _same(known: WorkerReport, told: WorkerReport) -> bool:
    """Return True when two reports are of one run of a worker.

    When it started may be reckoned from two clocks, and then differs a little from report to report.
    """
    return known.access == told.access and abs(known.started_at - told.started_at) < SAME_START_S


def _order(report: HiveReport) -> tuple[float, int]:
    return report.epoch, report.sequence


def _key(host: str) -> str:
    """Return where the servers of a host are kept: beside its hive, under what is no name of a hive."""
    return f"{host} (servers)"


def _there(hive: Hive, model: ModelReport) -> bool:
    """Return True unless a model is only on servers that do not answer."""
    return hive.serves is None or any(w.ready and w.report.model == model.name for w in hive.workers.values())


def _silent(model: str, capability: str, hives: Iterable[Hive]) -> Busy | None:
    """Return why servers that could do this do not, if there are any."""
    down = [
        worker
        for hive in hives
        for worker in hive.workers.values()
        if hive.serves and worker.report.model == model and not worker.ready
        if capability in worker.report.capabilities
    ]
    why = "; ".join(f"{worker.id}: {worker.report.reason or 'nothing was heard of it yet'}" for worker in down)
    return Busy(f"No server that has the model {model!r} answers ({why})", retry_after_s=5) if down else None


def _listed(hive: Hive | None, model: str) -> bool:
    return hive is not None and any(found.name == model for found in hive.report.models)


def _declared(watched: Watched, model: str) -> bool:
    """Return True when a host that never answered is to have a worker with this model."""
    return watched.heard_at < 0 and any(worker.model == model for worker in watched.host.workers)


def _unreached(hosts: Iterable[Watched], message: str) -> Busy:
    why = "; ".join(f"{watched.host.name}: {watched.reason or watched.state}" for watched in hosts)
    return Busy(f"{message} ({why})", retry_after_s=5)
