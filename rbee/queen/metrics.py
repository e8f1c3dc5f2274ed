"""The queen's Prometheus metrics."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from rbee import __version__
from rbee.errors import RbeeError, SetupProblem
from rbee.wire.gitops import GitopsState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rbee.queen.fleet import Fleet
    from rbee.queen.gitops import Gitops
    from rbee.queen.inventory import FollowedInventory
    from rbee.queen.job import Job
    from rbee.queen.queueing import Queues

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TIMINGS = re.compile(rb'"(prompt_n|cache_n|predicted_n)"\s*:\s*(\d{1,12})')
USAGE = re.compile(rb'"(prompt_tokens|input_tokens|completion_tokens|output_tokens)"\s*:\s*(\d{1,12})')


def read_usage(data: bytes) -> tuple[int, int]:
    """Return the tokens read and written that an answer tells of, 0 for what it does not."""
    told = {name: int(value) for name, value in USAGE.findall(data)}
    if not told and b'"timings"' in data:
        # llama.cpp counts here even when the client asked for no usage in its stream.
        timings = {name: int(value) for name, value in TIMINGS.findall(data)}
        return timings.get(b"prompt_n", 0) + timings.get(b"cache_n", 0), timings.get(b"predicted_n", 0)
    read = told.get(b"prompt_tokens", told.get(b"input_tokens", 0))
    return read, told.get(b"completion_tokens", told.get(b"output_tokens", 0))


class Metrics:
    """Counts jobs. Labels are endpoints, models that exist, and outcomes: a bounded set, whatever clients send."""

    def __init__(self, fleet: Fleet) -> None:
        self.registry = CollectorRegistry()
        self._jobs = Counter("rbee_jobs", "Jobs that ended.", ["endpoint", "model", "outcome"], registry=self.registry)
        self._in_flight = Gauge("rbee_jobs_in_flight", "Jobs in the queen at present.", registry=self.registry)
        self._retries = Counter("rbee_job_retries", "Jobs sent to a second worker.", registry=self.registry)
        self._broken = Counter(
            "rbee_streams_broken", "Streams that ended with an error event.", ["code"], registry=self.registry
        )
        self._tokens = Counter(
            "rbee_tokens", "Tokens read and written.", ["model", "direction"], registry=self.registry
        )
        self._first = Histogram(
            "rbee_time_to_first_byte_seconds",
            "From a request to the first byte of its answer.",
            ["endpoint"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._duration = Histogram(
            "rbee_job_duration_seconds",
            "From a request to the end of its answer.",
            ["endpoint"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._refused = Counter(
            "rbee_requests_refused", "Requests refused before they were a job.", ["status"], registry=self.registry
        )
        Gauge("rbee_build_info", "The version that runs.", ["version"], registry=self.registry).labels(__version__).set(
            1
        )
        self.registry.register(_FleetCollector(fleet))

    def show_queues(self, queues: Queues) -> None:
        """Also tell of those who wait."""
        self.registry.register(_QueueCollector(queues))

    def show(self, inventory: FollowedInventory, gitops: Gitops) -> None:
        """Also tell of the inventory and of the reconciler."""
        self.registry.register(_InventoryCollector(inventory))
        self.registry.register(_GitopsCollector(gitops))

    def started(self, job: Job) -> None:
        """Count a job in."""
        self._in_flight.inc()

    def first_byte(self, job: Job) -> None:
        """Note how long a job waited for its answer to begin."""
        self._first.labels(job.path).observe(time.monotonic() - job.received_at)

    def ended(self, job: Job, outcome: str) -> None:
        """Count a job out. `outcome` is ok, cancelled, or an error's code."""
        self._in_flight.dec()
        model = job.request.model if job.worker_id else "none"
        self._jobs.labels(job.path, model, outcome).inc()
        self._duration.labels(job.path).observe(time.monotonic() - job.received_at)

    def retried(self, job: Job) -> None:
        """Count a second attempt."""
        self._retries.inc()

    def broken(self, job: Job, problem: RbeeError) -> None:
        """Count a stream that could not be ended well."""
        self._broken.labels(problem.code or "error").inc()

    def refused(self, status: int) -> None:
        """Count a request that never became a job."""
        self._refused.labels(str(status)).inc()

    def count_usage(self, job: Job, data: bytes, head: bytes = b"") -> None:
        """Read the usage from the end of an answer, where engines put it; Anthropic's streams tell a part in `head`."""
        job.prompt_tokens, job.completion_tokens = read_usage(head[:2048] + data[-8192:])
        for direction, count in (("in", job.prompt_tokens), ("out", job.completion_tokens)):
            if count:
                self._tokens.labels(job.request.model, direction).inc(count)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _FleetCollector(Collector):
    """Reads the fleet when Prometheus asks."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[GaugeMetricFamily]:
        hives = GaugeMetricFamily("rbee_hive_up", "1 while a hive reports.", labels=["hive"])
        workers = GaugeMetricFamily(
            "rbee_worker_state", "1 for the state a worker is in.", labels=["hive", "worker", "model", "state"]
        )
        busy = GaugeMetricFamily("rbee_worker_jobs", "Jobs at a worker.", labels=["hive", "worker", "model"])
        for name in self._fleet.watched.keys() - self._fleet.hives.keys():
            hives.add_metric([name], 0)
        ejected = GaugeMetricFamily(
            "rbee_worker_ejected", "1 while jobs go elsewhere because many failed there.", labels=["hive", "worker"]
        )
        for hive in self._fleet.hives.values():
            name = hive.report.hive
            if hive.serves is None:
                hives.add_metric([name], 0 if hive.lost else 1)
            for worker in hive.workers.values():
                labels = [name, worker.report.name, worker.report.model]
                workers.add_metric([*labels, str(worker.report.state)], 1)
                busy.add_metric(labels, worker.in_flight)
                ejected.add_metric(labels[:2], int(worker.ejection.ejected))
        yield from (hives, workers, busy, ejected)


class _QueueCollector(Collector):
    """Counts those who wait for their turn when Prometheus asks."""

    def __init__(self, queues: Queues) -> None:
        self._queues = queues

    def collect(self) -> Iterator[GaugeMetricFamily]:
        jobs = GaugeMetricFamily("rbee_queue_jobs", "Jobs that wait for their turn.", labels=["model", "priority"])
        for (model, priority), number in self._queues.counts().items():
            jobs.add_metric([model, priority], number)
        yield jobs


class _InventoryCollector(Collector):
    """Tells whether the inventory on disk is the one in force."""

    def __init__(self, inventory: FollowedInventory) -> None:
        self._inventory = inventory

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily(
            "rbee_inventory_valid", "0 while the inventory on disk has mistakes.", value=int(self._inventory.valid)
        )
        yield GaugeMetricFamily(
            "rbee_inventory_hosts", "Hosts of the inventory in force.", value=len(self._inventory.hosts)
        )


class _GitopsCollector(Collector):
    """Reads what the reconciler wrote when Prometheus asks; without one there is nothing to tell."""

    def __init__(self, gitops: Gitops) -> None:
        self._gitops = gitops

    def collect(self) -> Iterator[GaugeMetricFamily]:
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
