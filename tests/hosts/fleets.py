"""An inventory folder of test machines, and `rbee` run on it as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machines import Machine

IGNORE = "IgnoreUnknown Hive*,Queen*,Worker*,Model*,Gpu*,Region*,Tags,Rbee*\n\n"
HANG_GUARD_S = 240
DEMO = "Worker demo model=rbee-demo"


@dataclass
class Fleet:
    """A folder with one file of hosts. `home` is the controller's own RBEE_HOME; the package cache is shared."""

    folder: Path
    home: Path
    machines: Sequence[Machine]
    lines: dict[str, list[str]] = field(default_factory=dict)
    user: str = "root"

    def write(self, **lines: Sequence[str]) -> Fleet:
        """Write the inventory anew: each machine by its name with its lines."""
        self.lines = {name.replace("_", "-"): list(more) for name, more in lines.items()}
        blocks = [m.host_block(*self.lines.get(m.name, []), user=self.user) for m in self.machines]
        self.folder.mkdir(exist_ok=True)
        (self.folder / "fleet.conf").write_text(IGNORE + "\n".join(blocks).replace("    UserKnownHostsFile", "    #"))
        (self.folder / "known_hosts").write_text("".join(f"{m.known_hosts_line()}\n" for m in self.machines))
        return self

    def rbee(
        self, *words: str, env: Mapping[str, str] = {}, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run one command and return how it ended; a traceback is always a failure."""
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=HANG_GUARD_S, check=False, input=stdin or "",
            env=self.environment(env),
        )  # fmt: skip
        assert "Traceback" not in done.stderr + done.stdout, done.stderr + done.stdout
        return done

    def command(self, *words: str) -> list[str]:
        """Return the command line of one `rbee`."""
        return [sys.executable, "-m", "rbee.cli.main", *words]

    def environment(self, more: Mapping[str, str] = {}) -> dict[str, str]:
        """Return what `rbee` runs with."""
        return {**os.environ, "RBEE_HOME": str(self.home), "NO_COLOR": "1", **more}

    def apply(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run `rbee apply --yes`; with `code`, that is how it must end."""
        done = self.rbee("apply", str(self.folder), "--yes", *words)
        assert code is None or done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def plan(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `rbee plan`."""
        return self.rbee("plan", str(self.folder), *words)

    def outcomes(self, *words: str) -> dict[str, dict[str, Any]]:
        """Run `rbee apply --yes --json` and return what became of each host."""
        done = self.rbee("apply", str(self.folder), "--yes", "--json", *words)
        assert done.stdout, done.stderr
        found: dict[str, dict[str, Any]] = json.loads(done.stdout)["outcomes"]
        return found


def worker_state(machine: Machine, name: str = "demo") -> str:
    """Return systemd's word for a worker's unit."""
    return machine.console(f"systemctl is-active rbee-worker@{name}.service", check=False).stdout.strip()


def process_id(machine: Machine, unit: str) -> str:
    """Return the process that a unit runs at present."""
    return machine.console(f"systemctl show --value --property=MainPID {unit}").stdout.strip()


def hang_up(fleet: Fleet) -> None:
    """End the connections that `rbee` keeps for a minute: only a new one looks at keys again."""
    print_folder = "from rbee.apply.ssh import socket_folder; print(socket_folder())"
    command = [sys.executable, "-c", print_folder]
    env = fleet.environment()
    folder = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()
    for socket in Path(folder).iterdir():
        subprocess.run(["ssh", "-o", f"ControlPath={socket}", "-O", "exit", "any"], capture_output=True, check=False)
