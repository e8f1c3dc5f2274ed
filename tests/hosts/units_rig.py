"""A machine with rbee's real units on it: a release, settings, secrets and a fleet's certificates, without `apply`."""

from __future__ import annotations

import contextlib
import inspect
import io
import secrets
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from fleet_certificates import make_authority
from machines import Machine, wait_until

from rbee.apply import unpack
from rbee.apply.release import Target, build, stream
from rbee.apply.templates import render
from rbee.client import Client
from rbee.errors import Lost
from rbee.http.tls import client_context
from rbee.wire.fleet import HiveReport, WorkerReport, WorkerState
from rbee.wire.settings import HiveSettings, Tls, WorkerSettings, dump_settings

CREDENTIALS = Tls(certificate="host.crt", key="host.key", authority="ca.crt")
HIVE_PORT, FIRST_PORT = 7835, 8001
LEASE_S = 30
UNITS = "/etc/systemd/system"


@dataclass
class Host:
    """A machine with a hive and declared workers, and clients of both."""

    machine: Machine
    folder: Path
    token: str
    worker_token: str

    @property
    def client(self) -> Client:
        """Return a client of the hive that trusts the fleet's authority."""
        url = f"https://{self.machine.address}:{HIVE_PORT}"
        return Client(url, token=self.token, tls=client_context(self.folder / "ca.crt"))

    def worker_client(self, port: int = FIRST_PORT) -> Client:
        """Return a client of a worker."""
        url = f"https://{self.machine.address}:{port}"
        return Client(url, token=self.worker_token, timeout_s=60, tls=client_context(self.folder / "ca.crt"))

    def workers(self) -> dict[str, WorkerReport]:
        """Return what the hive reports."""
        client = self.client
        try:
            return {worker.name: worker for worker in client.get("/v1/hive", HiveReport).workers}
        finally:
            client.close()

    def reported(self, name: str, *states: WorkerState) -> WorkerReport:
        """Return the hive's report on a worker once it is in one of these states."""
        seen: list[WorkerReport] = []

        def arrived() -> bool:
            with contextlib.suppress(Lost):  # the hive may be about to start
                seen[:] = [worker for worker in self.workers().values() if worker.name == name]
            return bool(seen) and seen[0].state in states

        wait_until(arrived, f"{name} to be reported {' or '.join(states)}")
        return seen[0]

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return systemd's properties of a unit."""
        lines = self.machine.console(f"systemctl show --property={','.join(properties)} '{unit}'").stdout
        return dict(line.split("=", 1) for line in lines.splitlines() if "=" in line)

    def state(self, unit: str) -> str:
        """Return systemd's ActiveState of a unit."""
        return self.show(unit, "ActiveState")["ActiveState"]

    def pid(self, unit: str) -> int:
        """Return the main process of a unit, 0 when it has none."""
        return int(self.show(unit, "MainPID")["MainPID"])


def install(machine: Machine, folder: Path, workers: Sequence[str]) -> Host:
    """Put a release, settings, secrets and units on a machine; nothing is started."""
    host = Host(machine, folder, secrets.token_urlsafe(24), secrets.token_urlsafe(24))
    _release(machine, folder)
    files = {**_fleet_files(machine, folder), "/etc/rbee/secrets/hive-token": host.token}
    for name in ("rbee.target", "rbee-lease.timer", "rbee-lease.service"):
        files[f"{UNITS}/{name}"] = render(name)
    files[f"{UNITS}/rbee-hive.service"] = render("rbee-hive.service", run_as="rbee")
    hive = HiveSettings(name=machine.name, token_file="hive-token", tls=CREDENTIALS, authority="ca.crt")
    files["/etc/rbee/hive.yaml"] = dump_settings(hive)
    for port, name in enumerate(workers, FIRST_PORT):
        files |= worker_files(name, port, host.worker_token)
    write(machine, files)
    prepare = (
        "useradd --system --user-group --no-create-home --home-dir /var/lib/rbee --shell /usr/sbin/nologin rbee;"
        "mkdir -p /var/lib/rbee/hive /var/lib/rbee/models /etc/rbee/workers /etc/rbee/worker-tokens;"
        "chown -R rbee: /var/lib/rbee/hive /etc/rbee/worker-tokens; chmod 700 /etc/rbee/secrets /var/lib/rbee/hive;"
        "systemctl daemon-reload; systemctl enable rbee.target rbee-hive.service"
    )
    machine.ssh(f"{prepare} {' '.join(f'rbee-worker@{name}.service' for name in workers)}")
    return host


def worker_files(name: str, port: int, token: str, **settings: object) -> dict[str, str]:
    """Return all files of one declared worker of the built-in model."""
    variables = {
        "name": name,
        "port": port,
        "start_limit_s": 60,
        "memory_max_bytes": 0,
        "devices": [],
        "writable_executable": False,
    }
    whole: dict[str, object] = {"model": "rbee-demo", "tls": CREDENTIALS, **settings}
    return {
        f"{UNITS}/rbee-worker@{name}.service": render("rbee-worker@.service", **variables),
        f"{UNITS}/rbee-worker@{name}.socket": render("rbee-worker@.socket", **variables),
        f"/etc/rbee/workers/{name}.yaml": dump_settings(WorkerSettings(name=name, port=port, **whole)),  # type: ignore[arg-type]
        f"/etc/rbee/worker-tokens/{name}": token,
    }


def write(machine: Machine, files: dict[str, str]) -> None:
    """Write files on a machine; those of secrets are their owner's alone."""
    program = (
        "import json, os, sys\n"
        "for path, text in json.load(sys.stdin).items():\n"
        "    os.makedirs(os.path.dirname(path), exist_ok=True)\n"
        "    open(path, 'w').write(text)\n"
        "    os.chmod(path, 0o600 if 'secrets' in path or 'tokens' in path else 0o644)\n"
    )
    machine.ssh(f'python3 -c "{program}"', stdin=msgspec.json.encode(files).decode())


def _release(machine: Machine, folder: Path) -> None:
    target = Target(python="3.11", libc="glibc 2.36")
    release = build(frozenset({"hive"}), frozenset({"xllamacpp"}), target, folder=folder / "cache")
    (folder / "unpack.py").write_text(inspect.getsource(unpack))
    machine.ssh("cat > /var/tmp/unpack.py", stdin=(folder / "unpack.py").read_text())
    sent = io.BytesIO()
    for part in stream(release, [layer.sha256 for layer in release.layers]):
        sent.write(part)
    command = "cd /var/tmp && python3 -c 'import sys, unpack; print(unpack.receive(\"/opt/rbee\", sys.stdin.buffer))'"
    line = ["ssh", "-F", str(machine.folder / "ssh_config"), f"root@{machine.name}", command]
    done = subprocess.run(line, input=sent.getvalue(), capture_output=True, timeout=300, check=True)
    machine.ssh(f"ln -sfn releases/{done.stdout.decode().strip()} /opt/rbee/current")


def _fleet_files(machine: Machine, folder: Path) -> dict[str, str]:
    """Make an authority and this host's certificate; the authority stays in `folder` as well."""
    authority = make_authority(folder)
    host = authority.host(folder / "host", (machine.name, machine.address, "localhost", "127.0.0.1"))
    return {f"/etc/rbee/secrets/{file.name}": file.read_text() for file in host.iterdir()}
