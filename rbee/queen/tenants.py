"""Metrics that carry the tenant: the operator sees all of them, a tenant's key only its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rbee.queen.counting import Counts, Distributions, Labels, Names, Numbers, everything

if TYPE_CHECKING:
    from rbee.queen.job import Job

SECONDS = (0.1, 0.5, 1, 5, 10, 30, 60, 300)
MAX_TENANTS = 1000
"""Tenants of tokens are named by an issuer; past so many they share one label, so that a page stays bounded."""
NO_MODEL = "none"


class TenantMetrics:
    """Counts the jobs of keys that have a tenant."""

    def __init__(self) -> None:
        self._tenants = Names(MAX_TENANTS)
        self._in_flight = Numbers("rbee_tenant_jobs_in_flight", "A tenant's jobs in the queen at present.", ("tenant",))
        self._jobs = Counts("rbee_tenant_jobs_total", "A tenant's jobs that ended.", ("tenant", "model", "outcome"))
        self._tokens = Counts(
            "rbee_tenant_tokens_total", "Tokens read and written for a tenant.", ("tenant", "model", "direction")
        )
        self._duration = Distributions(
            "rbee_tenant_job_duration_seconds",
            "From a tenant's request to the end of its answer.",
            ("tenant",),
            SECONDS,
        )

    def started(self, job: Job) -> None:
        """Count a job in."""
        if job.caller.policy.tenant:
            self._in_flight[self._tenants.label(job.caller.policy.tenant),] += 1

    def ended(self, job: Job, outcome: str) -> None:
        """Count a job out. `outcome` is ok, cancelled, or an error's code."""
        if not job.caller.policy.tenant:
            return
        tenant = self._tenants.label(job.caller.policy.tenant)
        # Clients name models: one that served nothing may not exist.
        model = job.request.model if job.worker_id else NO_MODEL
        self._in_flight[tenant,] -= 1
        self._jobs[tenant, model, outcome] += 1
        self._duration[tenant,].observe(time.monotonic() - job.received_at)
        if job.prompt_tokens:
            self._tokens[tenant, model, "in"] += job.prompt_tokens
        if job.completion_tokens:
            self._tokens[tenant, model, "out"] += job.completion_tokens

    def render(self, tenant: str | None = None) -> bytes:
        """Return one tenant's series, or everybody's, in Prometheus' text format."""

        def wanted(labels: Labels) -> bool:
            return labels[0] == tenant

        families = (self._in_flight, self._jobs, self._tokens, self._duration)
        return "".join(family.text(wanted if tenant is not None else everything) for family in families).encode()
