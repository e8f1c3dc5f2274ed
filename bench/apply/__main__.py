"""Time whole applies on real hosts: rbee, ansible-playbook and the pyinfra command, in turns.

usage: python -m bench.apply [--hosts 2] [--rounds 5] [--scenario NAME]…        (as root; see docs/development.md)
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "hosts"))

from machines import Machine, base_tree, started_rig, why_no_machines

from bench.apply.contenders import UNITS, Run, Setting
from bench.figures import conditions, ratio, spread, table

CONTENDERS = ("rbee", "ansible", "pyinfra")
SCENARIOS = ("first", "no-op, cold", "no-op, warm", "one value", "black hole")
STATE = (
    "cat " + " ".join(f"/etc/systemd/system/{unit}" for unit in UNITS) + " | sha256sum; "
    "systemctl is-active " + " ".join(UNITS) + "; systemctl is-enabled " + " ".join(UNITS) + "; "
    "systemctl show --value -p Environment " + " ".join(UNITS)
)


def main() -> None:
    """Boot the hosts, run the rounds and print a table a scenario."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scenario", action="append", choices=SCENARIOS)
    given = parser.parse_args()
    if reason := why_no_machines():
        sys.exit(reason)
    print(conditions(["rbee", "ansible-core", "pyinfra"]), f"{given.hosts} hosts", sep="; ", end="\n\n", flush=True)
    with started_rig(base_tree(print)) as rig, rig.machines(given.hosts) as machines:
        bench = Bench(machines)
        for scenario in given.scenario or SCENARIOS:
            bench.measure(scenario, given.rounds)


class Bench:
    """The hosts, and the times that were taken on them."""

    def __init__(self, machines: Sequence[Machine]) -> None:
        self._machines = machines
        self._folder = Path(tempfile.mkdtemp(prefix="rb-"))
        self._homes = {name: Path(tempfile.mkdtemp(prefix=f"rb-{name}-")) for name in CONTENDERS}
        self._setting = Setting(self._folder, machines)
        self._value = 0
        self._healthy: list[float] = []

    def measure(self, scenario: str, rounds: int) -> None:
        """Run a scenario's rounds, the contenders in another order each time, and print its table."""
        times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(rounds):
            taken = {}
            for name in random.sample(CONTENDERS, len(CONTENDERS)):
                taken[name] = self._once(scenario, name)
            for name, seconds in taken.items():
                times[name].append(seconds)
        rows = []
        for name, of in times.items():
            against = [ratio(times["rbee"], times[other]) for other in ("ansible", "pyinfra")]
            cells = [found.text(3) if found else "" for found in against] if name == "rbee" else ["", ""]
            rows.append([name, *spread(of).cells(3), *cells])
        if self._healthy:
            rows.append(["rbee, the healthy hosts done", *spread(self._healthy).cells(3), "", ""])
            self._healthy.clear()
        print(f"### {scenario}\n")
        print(
            table(["whole process", "min s", "median s", "max s", "of ansible's", "of pyinfra's"], rows),
            "\n",
            flush=True,
        )

    def _once(self, scenario: str, name: str) -> float:
        if scenario == "first":
            self._clear()
            self._setting.prepare(self._value)
        else:
            self._setting.prepare(self._value)
            self._check(self._setting.run(name, self._homes[name]), name)
        if scenario == "one value":
            self._value += 1
            self._setting.prepare(self._value)
        if scenario != "no-op, warm":
            self._hang_up(name)
        dark = self._machines[-1:] if scenario == "black hole" else []
        for machine in dark:
            machine.blackhole()
        done = self._setting.run(name, self._homes[name])
        for machine in dark:
            machine.heal()
        if not dark:
            self._check(done, name)
        self._same(machine for machine in self._machines if machine not in dark)
        if dark and done.done_s:
            self._healthy.append(done.done_s)
        return done.seconds

    def _check(self, done: Run, name: str) -> None:
        if done.returncode:
            sys.exit(f"{name} failed ({done.returncode}):\n{done.output}")

    def _same(self, machines: Iterable[Machine]) -> None:
        """Every host must have reached the same end state."""
        states = {machine.console(STATE).stdout for machine in machines}
        [state] = states
        assert state.count("active\n") == state.count("enabled\n") == len(UNITS), state
        assert state.count(f"VALUE={self._value}\n") == len(UNITS), state

    def _clear(self) -> None:
        for machine in self._machines:
            units = " ".join(UNITS)
            machine.console(f"systemctl disable -q --now {units}; rm -f /etc/systemd/system/rbee-bench-*", check=False)
            machine.console("rm -rf /var/lib/rbee; systemctl daemon-reload")

    def _hang_up(self, name: str) -> None:
        """End the connections that a contender keeps open."""
        patterns = [f"{Path(tempfile.gettempdir())}/rbee-ssh-*/*", f"{Path.home()}/.ansible/cp/*"]
        for pattern in patterns:
            for socket in Path("/").glob(pattern.lstrip("/")):
                subprocess.run(
                    ["ssh", "-o", f"ControlPath={socket}", "-O", "exit", "x"], capture_output=True, check=False
                )


if __name__ == "__main__":
    main()
