"""Where a job may run, whatever a routing script says: region and tenant."""

from __future__ import annotations

from rbee.inventory.fleet import Host

OTHER_TENANT = "it is another tenant's"


def objection(region: str, tenant: str, host: Host | None) -> str:
    """Return why a job that must stay in a region, of a tenant, must not run on a host, or nothing.

    `host` is None for this machine without an inventory. Regions are compared without regard to case.
    """
    here, owner = (host.region, host.tenant) if host else ("", "")
    if region and here.casefold() != region.casefold():
        return f"it is in {f'the region {here}' if here else 'no region'}, and the job must stay in {region}"
    if owner and owner != tenant:
        return OTHER_TENANT
    return ""
