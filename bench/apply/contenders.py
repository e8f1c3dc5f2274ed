"""What is measured: three ways to bring the same unit files to hosts, have them enabled and running."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from machines import Machine

UNIT = """\
[Unit]
Description=bench unit {number}

[Service]
Environment=VALUE={value}
ExecStart=/bin/sleep infinity

[Install]
WantedBy=multi-user.target

[X-Rbee]
"""
PLAYBOOK = """\
- hosts: all
  gather_facts: false
  tasks:
    - name: unit files
      copy:
        src: "{folder}/units/{{{{ item }}}}"
        dest: "/etc/systemd/system/{{{{ item }}}}"
        mode: "0644"
      loop: {units}
      register: files
    - name: reload
      systemd_service:
        daemon_reload: true
      when: files.changed
    - name: running
      systemd_service:
        name: "{{{{ item.item }}}}"
        enabled: true
        state: "{{{{ 'restarted' if item.changed else 'started' }}}}"
      loop: "{{{{ files.results }}}}"
      loop_control:
        label: "{{{{ item.item }}}}"
"""
ANSIBLE_CFG = """\
[defaults]
host_key_checking = True
retry_files_enabled = False
forks = {forks}
timeout = 5
[ssh_connection]
pipelining = True
ssh_args = -F {config} -o ControlMaster=auto -o ControlPersist=60s -o ConnectTimeout=5
"""
PYINFRA = """\
from pyinfra.operations import files, systemd

UNITS = {units}

for unit in UNITS:
    put = files.put(
        name=f"file {{unit}}", src=f"{folder}/units/{{unit}}", dest=f"/etc/systemd/system/{{unit}}", mode="644"
    )
    systemd.daemon_reload(name=f"reload for {{unit}}", _if=put.did_change)
    systemd.service(
        name=f"restart {{unit}}", service=unit, running=True, restarted=True, _if=put.did_change
    )
    systemd.service(name=f"up {{unit}}", service=unit, running=True, enabled=True)
"""
UNITS = tuple(f"rbee-bench-{number}.service" for number in (1, 2, 3))
LIMIT_S = 300


@dataclass(frozen=True)
class Setting:
    """A folder with everything that the contenders read."""

    folder: Path
    hosts: Sequence[Machine]

    def prepare(self, value: int) -> None:
        """Write the units, with this value in them, and each contender's own files."""
        units = self.folder / "units"
        units.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(UNITS, 1):
            (units / name).write_text(UNIT.format(number=number, value=value))
        config = self.folder / "fleet.conf"
        # `#` : the pinned keys of all of them are in known_hosts, which rbee's own policy names.
        # The other two run as root and make no user.
        blocks = [machine.host_block("RbeeUser root") for machine in self.hosts]
        # In rbee a value stands in the inventory; here in a comment, for the units are files beside it.
        config.write_text(f"IgnoreUnknown Rbee*\n# {value}\n" + "\n".join(blocks))
        (self.folder / "known_hosts").write_text("".join(f"{m.known_hosts_line()}\n" for m in self.hosts))
        (self.folder / "hosts.ini").write_text("".join(f"{m.name}\n" for m in self.hosts))
        (self.folder / "site.yml").write_text(PLAYBOOK.format(folder=self.folder, units=list(UNITS)))
        forks = max(5, len(self.hosts))
        (self.folder / "ansible.cfg").write_text(ANSIBLE_CFG.format(forks=forks, config=config))
        (self.folder / "deploy.py").write_text(PYINFRA.format(folder=self.folder, units=list(UNITS)))
        data = f'{{"ssh_config_file": "{config}", "ssh_user": "root"}}'
        known = f'{{"ssh_known_hosts_file": "{self.folder / "known_hosts"}", "ssh_strict_host_key_checking": "yes"}}'
        keys = ", ".join(f'("{m.name}", {{"ssh_hostname": "{m.address}", "ssh_key": "{m.key}"}})' for m in self.hosts)
        (self.folder / "inventory.py").write_text(f"hosts = ([{keys}], {{**{data}, **{known}}})\n")

    def command(self, contender: str) -> list[str]:
        """Return the command line of a contender."""
        here = Path(sys.executable)
        return {
            "rbee": [str(here), "-m", "bench.apply.rbee_units", str(self.folder)],
            "ansible": [str(here.with_name("ansible-playbook")), "-i", "hosts.ini", "site.yml"],
            "pyinfra": [str(here.with_name("pyinfra")), "-y", "inventory.py", "deploy.py"],
        }[contender]

    def run(self, contender: str, home: Path) -> Run:
        """Run a contender to its end."""
        env = {
            **os.environ,
            "RBEE_HOME": str(home),
            "ANSIBLE_CONFIG": str(self.folder / "ansible.cfg"),
            "ANSIBLE_LOCAL_TEMP": str(home / "ansible"),
            "PYTHONPATH": os.getcwd(),
            "LC_ALL": "C.UTF-8",
        }
        folder = os.getcwd() if contender == "rbee" else str(self.folder)
        return _timed(self.command(contender), env, folder)


@dataclass(frozen=True)
class Run:
    """One run of a contender. `done_s` is when it said of the last host that it is done, for one that says so."""

    returncode: int
    output: str
    seconds: float
    done_s: float


def _timed(command: Sequence[str], env: Mapping[str, str], folder: str) -> Run:
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = threading.Timer(LIMIT_S, process.kill)
    timer.start()
    lines, done_s = [], 0.0
    assert process.stdout
    for line in process.stdout:
        lines.append(line)
        if line.startswith("done "):
            done_s = time.monotonic() - began
    process.wait()
    timer.cancel()
    return Run(process.returncode, "".join(lines), time.monotonic() - began, done_s)
