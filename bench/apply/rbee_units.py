"""rbee's contender: its own apply, whole (lock, observe, plan, engine, transaction, audit, history), for plain units.

usage: python -m bench.apply.rbee_units FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rbee.apply.converge import Apply
from rbee.apply.desired import UNITS, Desired, File, Service, digest_of
from rbee.apply.plan import HostPlan
from rbee.apply.survey import Survey
from rbee.inventory.fleet import Host


class Units(Survey):
    """Wants the unit files of a folder on every host, and nothing else of rbee there."""

    def plan(self, host: Host) -> HostPlan:
        """Return what leads from the observed state to these units."""
        files: dict[str, File] = {}
        services: list[Service] = []
        for source in sorted((self.fleet.folder / "units").iterdir()):
            own = {f"{UNITS}/{source.name}": File(content=source.read_bytes())}
            files |= own
            services.append(
                Service(role="worker", unit=source.name, name=source.stem, files=list(own), hash=digest_of(own))
            )
        release = self.seen[host.name]["current"]
        wanted = Desired(
            host=host.name,
            run_as=host.run_as,
            release=release,
            folders={},
            files=files,
            services=services,
            targets=[],
            models=[],
        )
        self.wanted[host.name] = wanted
        return self.compare(host, wanted, None)


def main() -> int:
    """Apply and return 0 when every host converged, 3 when not."""
    with Apply(Path(sys.argv[1]), survey=Units) as apply:
        planned = apply.plan(lock=True, patient=False, told=compared)
        outcomes = apply.execute(planned, told)
        if planned.late:
            outcomes |= apply.execute(apply.plan_late(), told)
        apply.note(outcomes)
    bad = {name: outcome.problem for name, outcome in outcomes.items() if outcome.state != "converged"}
    print(bad or "converged")
    return 3 if bad else 0


def compared(host: str, plan: HostPlan | None) -> None:
    """Say of a host that nothing is to be done: the bench asks how long the healthy ones took."""
    if plan is not None and plan.is_empty:
        print(f"done {host}", flush=True)


def told(host: str, event: dict[str, Any]) -> None:
    """Hear that a host is done."""
    if event["event"] == "result":
        print(f"done {host}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
