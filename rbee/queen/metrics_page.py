"""Prometheus' page: everything for the operator, its own series for a tenant."""

from __future__ import annotations

from rbee.queen.metrics import Metrics
from rbee.queen.tenants import TenantMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics_page(metrics: Metrics, tenants: TenantMetrics, tenant: str = "") -> bytes:
    """Return the page in Prometheus' text format; of one `tenant`, or of everything."""
    return tenants.render(tenant) if tenant else metrics.render() + tenants.render()
