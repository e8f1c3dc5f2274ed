"""What Prometheus reads of the queen's parts when it asks: fleet, queues, script, records, inventory, reconciler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from rbee.errors import SetupProblem
from rbee.queen.counting import OTHER
from rbee.wire.gitops import GitopsState

if TYPE_CHECKING:
    from rbee.queen.fleet import Fleet
    from rbee.queen.gitops import Gitops
    from rbee.queen.inventory import FollowedInventory
    from rbee.queen.loop_lag import LoopLag
    from rbee.queen.queueing import Queues
    from rbee.queen.records import Records
    from rbee.queen.script import RoutingScript

OF_WORKER = ("hive", "worker", "model")


class FleetGauges(Collector):
    """Hives and workers, as the queen believes they are."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        yield from self._hives()
        yield from self._workers()

    def _hives(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("rbee_hive_up", "1 while a hive reports.", labels=["hive"])
        state = GaugeMetricFamily("rbee_hive_state", "1 for the state a hive is in.", labels=["hive", "state"])
        for name, watched in self._fleet.watched.items():
            if name not in self._fleet.hives:
                up.add_metric([name], 0)
                state.add_metric([name, str(watched.state)], 1)
        for hive in list(self._fleet.hives.values()):
            if hive.serves is None:
                name = hive.report.hive
                up.add_metric([name], 0 if hive.lost else 1)
                told = str(hive.watched.state) if hive.watched else "lost" if hive.lost else "ready"
                state.add_metric([name, told], 1)
        yield from (up, state)

    def _workers(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("rbee_worker_up", "1 while a worker takes jobs.", labels=OF_WORKER)
        state = GaugeMetricFamily("rbee_worker_state", "1 for the state a worker is in.", labels=[*OF_WORKER, "state"])
        busy = GaugeMetricFamily("rbee_worker_jobs", "Jobs at a worker.", labels=OF_WORKER)
        slots = GaugeMetricFamily("rbee_worker_slots", "How many jobs a worker answers at once.", labels=OF_WORKER)
        ejected = GaugeMetricFamily(
            "rbee_worker_ejected", "1 while jobs go elsewhere because many failed there.", labels=OF_WORKER[:2]
        )
        for hive in list(self._fleet.hives.values()):
            for worker in list(hive.workers.values()):
                labels = [hive.report.hive, worker.report.name, worker.report.model]
                up.add_metric(labels, int(worker.ready and not hive.away))
                state.add_metric([*labels, str(worker.report.state)], 1)
                busy.add_metric(labels, worker.in_flight)
                slots.add_metric(labels, worker.report.slots)
                ejected.add_metric(labels[:2], int(worker.ejection.ejected))
        yield from (up, state, busy, slots, ejected)


class QueueGauges(Collector):
    """Those who wait for their turn. Clients name models; those that no machine has are one."""

    def __init__(self, queues: Queues, fleet: Fleet) -> None:
        self._queues = queues
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("rbee_queue_jobs", "Jobs that wait for their turn.", labels=["model", "priority"])
        models, waiting = self._fleet.models(), Counter[tuple[str, str]]()
        for (model, priority), number in self._queues.counts().items():
            if number or model in models:
                waiting[model if model in models else OTHER, priority] += number
        for labels, number in waiting.items():
            jobs.add_metric(labels, number)
        yield jobs


class ScriptGauges(Collector):
    """How the routing script does."""

    def __init__(self, script: RoutingScript) -> None:
        self._script = script

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "rbee_script_valid",
            "0 while the routing script on disk is not the one in force, or fails.",
            value=int(not self._script.error),
        )
        yield CounterMetricFamily(
            "rbee_script_errors_total",
            "Times that a routing script failed, or did not compile.",
            value=self._script.errors,
        )


class RecordsGauges(Collector):
    """Whether jobs can be recorded: while they cannot, none is accepted."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "rbee_records_available", "0 while jobs are refused because they could not be recorded.",
            value=int(not self._records.problem),
        )  # fmt: skip


class LoopGauges(Collector):
    """How late the event loop is."""

    def __init__(self, lag: LoopLag) -> None:
        self._lag = lag

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "rbee_event_loop_longest_lag_seconds",
            "The longest lag of the event loop in the last half minute to a minute.",
            value=self._lag.longest_s,
        )


class InventoryGauges(Collector):
    """Whether the inventory on disk is the one in force."""

    def __init__(self, inventory: FollowedInventory) -> None:
        self._inventory = inventory

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "rbee_inventory_valid", "0 while the inventory on disk has mistakes.", value=int(self._inventory.valid)
        )
        yield GaugeMetricFamily(
            "rbee_inventory_mistakes", "Mistakes of the inventory on disk.", value=len(self._inventory.mistakes)
        )
        yield GaugeMetricFamily(
            "rbee_inventory_hosts", "Hosts of the inventory in force.", value=len(self._inventory.hosts)
        )


class GitopsGauges(Collector):
    """What the reconciler wrote; without one there is nothing to tell."""

    def __init__(self, gitops: Gitops) -> None:
        self._gitops = gitops

    def collect(self) -> Iterator[Metric]:
        failing = GaugeMetricFamily("rbee_gitops_failing", "1 while the reconciler cannot do its work.")
        try:
            status = self._gitops.status()
        except SetupProblem:
            failing.add_metric([], 1)
            yield failing
            return
        if status is None:
            return
        failing.add_metric([], int(status.state is GitopsState.FAILED))
        success = GaugeMetricFamily(
            "rbee_gitops_last_success_timestamp_seconds",
            "When every host was last seen to have the wanted revision.",
            value=status.applied_at,
        )
        checked = GaugeMetricFamily(
            "rbee_gitops_last_check_timestamp_seconds", "When the reconciler last looked.", value=status.checked_at
        )
        info = GaugeMetricFamily(
            "rbee_gitops_info", "The revisions and the state.", labels=["revision", "wanted", "state"]
        )
        info.add_metric([status.revision, status.wanted, status.state], 1)
        yield from (failing, success, checked, info)
