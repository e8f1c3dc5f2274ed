"""Time `rbee apply` on bare machines, one and four at once, and an upgrade of rbee alone.

usage: python -m bench.apply.bring_up [--rounds 3]        (as root; see docs/development.md)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "hosts"))

from machines import Machine, Rig, base_tree, started_rig, why_no_machines

from bench.figures import conditions, spread, table

ONE, FOUR, UPGRADE = "one bare machine", "four bare machines at once", "rbee upgraded on one machine"
WORKER = "systemctl show --value -p MainPID rbee-worker@demo.service"


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    if reason := why_no_machines():
        sys.exit(reason)
    print(conditions(["rbee", "xllamacpp"]), end="\n\n", flush=True)
    home = Path(tempfile.mkdtemp(prefix="rb-"))
    times: dict[str, list[float]] = {ONE: [], FOUR: [], UPGRADE: []}
    with started_rig(base_tree(print)) as rig:
        with rig.machines(1) as machines:  # packs the packages once
            apply(home, machines)
        for _ in range(rounds):
            one, upgrade = one_machine(rig, home)
            times[ONE].append(one)
            times[UPGRADE].append(upgrade)
            with rig.machines(4) as machines:
                times[FOUR].append(apply(home, machines))
    rows = [[name, *spread(of).cells(2)] for name, of in times.items()]
    print(table(["rbee apply, whole process", "min s", "median s", "max s"], rows))


def one_machine(rig: Rig, home: Path) -> tuple[float, float]:
    """Bring one machine up, then let it lack the newest rbee; return the times of both applies."""
    with rig.machines(1) as machines:
        [machine] = machines
        first = apply(home, machines)
        worker = machine.console(WORKER).stdout
        layer = machine.console("readlink -f /opt/rbee/current/site/rbee/__init__.py | cut -d/ -f1-5").stdout.strip()
        machine.console(
            "cd /opt/rbee/releases && mv $(basename $(readlink /opt/rbee/current)) older"
            f" && ln -sfn releases/older ../current && mv {layer} /root"
        )
        upgrade = apply(home, machines)
        assert machine.console(WORKER).stdout == worker, "the worker was restarted"
    return first, upgrade


def apply(home: Path, machines: Sequence[Machine]) -> float:
    """Apply an inventory of these machines, each with a hive and a worker; return the seconds it took."""
    folder = Path(tempfile.mkdtemp(prefix="rb-inventory-"))
    blocks = [machine.host_block("Worker demo model=rbee-demo") for machine in machines]
    (folder / "fleet.conf").write_text("IgnoreUnknown Worker*\n" + "\n".join(blocks))
    (folder / "known_hosts").write_text("".join(f"{machine.known_hosts_line()}\n" for machine in machines))
    if (home / "identity").exists():
        (folder / ".rbee").symlink_to(home / "identity")
    command = [str(Path(sys.executable).with_name("rbee")), "apply", str(folder), "--yes"]
    began = time.monotonic()
    done = subprocess.run(
        command, env={**os.environ, "RBEE_HOME": str(home)}, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - began
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}")
    if not (home / "identity").exists():
        (folder / ".rbee").rename(home / "identity")
    for machine in machines:
        assert machine.console("systemctl is-active rbee-hive rbee-worker@demo").stdout == "active\nactive\n"
    return seconds


if __name__ == "__main__":
    main()
