"""Metrics that carry the tenant: the operator sees all of them, a tenant's key only its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from rbee.queen.job import Job

SECONDS = (0.1, 0.5, 1, 5, 10, 30, 60, 300)
MAX_TENANTS = 1000
OTHER = "other"
"""Tenants of tokens are named by an issuer; past so many they share one label, so that a page stays bounded."""


class TenantMetrics:
    """Counts the jobs of keys that have a tenant."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._names: set[str] = set()
        self._in_flight = Gauge(
            "rbee_tenant_jobs_in_flight", "A tenant's jobs in the queen at present.", ["tenant"], registry=self.registry
        )
        self._jobs = Counter(
            "rbee_tenant_jobs", "A tenant's jobs that ended.", ["tenant", "model", "outcome"], registry=self.registry
        )
        self._tokens = Counter(
            "rbee_tenant_tokens",
            "Tokens read and written for a tenant.",
            ["tenant", "model", "direction"],
            registry=self.registry,
        )
        self._duration = Histogram(
            "rbee_tenant_job_duration_seconds",
            "From a tenant's request to the end of its answer.",
            ["tenant"],
            buckets=SECONDS,
            registry=self.registry,
        )

    def started(self, job: Job) -> None:
        """Count a job in."""
        if job.caller.policy.tenant:
            self._in_flight.labels(self._label(job)).inc()

    def ended(self, job: Job, outcome: str) -> None:
        """Count a job out. `outcome` is ok, cancelled, or an error's code."""
        if not job.caller.policy.tenant:
            return
        tenant, model = self._label(job), job.request.model if job.worker_id else "none"
        self._in_flight.labels(tenant).dec()
        self._jobs.labels(tenant, model, outcome).inc()
        self._duration.labels(tenant).observe(time.monotonic() - job.received_at)
        if job.prompt_tokens:
            self._tokens.labels(tenant, model, "in").inc(job.prompt_tokens)
        if job.completion_tokens:
            self._tokens.labels(tenant, model, "out").inc(job.completion_tokens)

    def render(self, tenant: str | None = None) -> bytes:
        """Return one tenant's series, or everybody's, in Prometheus' text format."""
        if tenant is None:
            return generate_latest(self.registry)
        page = CollectorRegistry(auto_describe=False)
        page.register(_Only(self.registry, tenant))
        return generate_latest(page)

    def _label(self, job: Job) -> str:
        name = job.caller.policy.tenant
        if name not in self._names:
            if len(self._names) >= MAX_TENANTS:
                return OTHER
            self._names.add(name)
        return name


class _Only(Collector):
    """The series of one tenant."""

    def __init__(self, registry: CollectorRegistry, tenant: str) -> None:
        self._registry = registry
        self._tenant = tenant

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            own = Metric(family.name, family.documentation, family.type)
            own.samples = [sample for sample in family.samples if sample.labels.get("tenant") == self._tenant]
            if own.samples:
                yield own
