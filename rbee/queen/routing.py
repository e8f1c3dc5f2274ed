"""Ask the routing script which of the places that can run a job should."""

from __future__ import annotations

import time
from collections.abc import Mapping

import gevent
from gevent.event import Event

from rbee.errors import Busy, NotFound, NotSupported, PolicyDenied, RbeeError, UnknownModel
from rbee.queen.decisions import DecisionLog
from rbee.queen.fleet import Fleet
from rbee.queen.job import Job
from rbee.queen.placement import OTHER_TENANT, objection
from rbee.queen.places import Candidate
from rbee.queen.prefixes import PrefixIndex, prefix_hashes
from rbee.queen.script import Explanation, RoutingScript
from rbee.queen.view import Place, Query, View

MAX_VIEWS = 256


class Routing:
    """Ranks the places for a job; waits, bounded, while the script chooses none."""

    def __init__(
        self, fleet: Fleet, script: RoutingScript, *, choice_timeout_s: float, decisions: DecisionLog | None = None
    ) -> None:
        self._fleet = fleet
        self._script = script
        self._timeout_s = choice_timeout_s
        self._decisions = decisions
        self._views: dict[Query, View] = {}
        self._prefixes = PrefixIndex()

    def rank(self, job: Job) -> list[Candidate]:
        """Return the chosen places, the first choice first.

        Raises: UnknownModel, NotSupported, ClientGone, Busy when no place can be reached or was chosen in time.
        """
        deadline = time.monotonic() + self._timeout_s
        query = query_of(job)
        while True:
            changed = self._fleet.changed
            view = self._able(query)
            if view is not None:
                others = view.without(job.failed_at) if job.failed_at else None
                chosen = (others and self._choose(job, others)) or self._choose(job, view)
                if chosen:
                    return chosen
            self._wait(job, changed, deadline - time.monotonic())

    def check(self, job: Job) -> None:
        """Refuse a job that no place could ever run. Raises: UnknownModel, NotSupported, Busy."""
        self._able(query_of(job))

    def explain(self, query: Query, task: Mapping[str, object]) -> tuple[View, Explanation]:
        """Decide for a job that is only described, and tell how. Raises: UnknownModel, NotSupported, Busy."""
        view = self._view(query)
        return view, self._script.explain(task, view.frozen())

    def served(self, job: Job) -> None:
        """Note which worker was sent a job, which now has the prompt's start in its cache."""
        if job.worker_id and self._script.reads_prefixes:
            self._prefixes.learn(_hashes(job), job.worker_id)

    def refused(self, query: Query) -> dict[str, str]:
        """Return the places that the script is not shown, by id, and why. Raises as `explain`."""
        places = self._places(query)
        found = {place.candidate.id: objection(query.region, query.tenant, place.host) for place in places}
        return {place_id: why for place_id, why in found.items() if why}

    def _choose(self, job: Job, view: View) -> list[Candidate]:
        began = time.perf_counter()
        prefixes = self._prefixes.match(_hashes(job)) if self._script.reads_prefixes else {}
        task, frozen = job.record(), view.frozen(prefixes)
        decision = self._script.decide(task, frozen)
        self._script.times[()].observe(time.perf_counter() - began)
        chosen = [view.places[index] for index in decision.indices]
        if self._decisions is not None:
            self._decisions.note(task, view.query, frozen, [place.id for place in chosen], decision.by)
        return chosen

    def _able(self, query: Query) -> View | None:
        """Return where a job may run, or None while a hive is still finding out what it has."""
        try:
            return self._view(query)
        except (UnknownModel, NotSupported, NotFound, Busy):
            if self._fleet.settled:
                raise
            return None

    def _view(self, query: Query) -> View:
        view = self._views.get(query)
        if view is not None and view.fresh(self._fleet):
            return view
        changed = self._fleet.changed
        places = self._places(query)
        # The script is shown none that policy forbids: one that asks only for the least busy must not be refused.
        allowed = [place for place in places if not objection(query.region, query.tenant, place.host)]
        if not allowed:
            raise self._nowhere(query, places)
        if len(self._views) >= MAX_VIEWS:
            self._views.clear()
        self._views[query] = view = View(query, allowed, changed, view)
        return view

    def _places(self, query: Query) -> list[Place]:
        found = self._fleet.candidates(query.model, query.capability, set(query.needs), query.hive)
        hosts = {hive.report.hive: hive.host for hive in self._fleet.hives.values()}
        return [Place(one, self._fleet.hives.get(one.hive), hosts.get(one.hive)) for one in found]

    def _nowhere(self, query: Query, places: list[Place]) -> RbeeError:
        # The names of machines, which may be another tenant's, are not the client's business.
        found = {objection(query.region, query.tenant, place.host) for place in places}
        message = f"No machine that has the model {query.model!r} may run this job ({'; '.join(sorted(found))})"
        hosts = [watched.host for watched in self._fleet.watched.values() if watched.away]
        if any(not objection(query.region, query.tenant, host) for host in hosts):
            return Busy(f"{message}; one that may is out of reach", retry_after_s=5)
        reason = "tenant" if found == {OTHER_TENANT} else "region"
        return PolicyDenied(message, reason=reason, hint="Region and RbeeTenant in the inventory", param="model")

    def _wait(self, job: Job, changed: Event, left_s: float) -> None:
        if left_s <= 0:
            raise Busy(
                f"The routing script chose no worker for this job within {self._timeout_s:g} s",
                retry_after_s=5,
                hint=f"the conditions in {self._script.source}",
            )
        with job.stepped_aside():
            gevent.wait([changed, job.client.gone], timeout=min(left_s, 1.0), count=1)
        job.client.check()


def query_of(job: Job) -> Query:
    """Return what decides where a job can run."""
    request = job.request
    needs = frozenset(request.needs())
    return Query(request.model, request.capability, needs, job.hive_wish, job.region, job.tenant)


def _hashes(job: Job) -> list[int]:
    return prefix_hashes(job.texts(), salt=job.request.model)
