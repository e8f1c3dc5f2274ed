"""A hive of an inventory as a real process. Only systemd is played: `systemctl` and `journalctl` print files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from fleet_certificates import Authority
from hive_rig import RunningHive, until

from rbee.wire.fleet import HiveReport, WorkerReport, WorkerState
from rbee.wire.settings import HiveSettings, Tls, WorkerSettings, dump_settings

HIVE_TOKEN, WORKER_TOKEN = "the-token-of-the-hive", "the-token-of-the-worker"
CREDENTIALS = Tls(certificate="host.crt", key="host.key", authority="ca.crt")
SYSTEMCTL = """\
#!/bin/sh
# systemctl show --no-pager --property=… -- UNIT…
[ -e "{units}/hangs" ] && exec sleep 600
while [ "$1" != -- ]; do shift; done; shift
for unit in "$@"; do
    printf 'Id=%s\\n' "$unit"
    cat "{units}/$unit" 2>/dev/null || printf 'LoadState=not-found\\nActiveState=inactive\\n'
    printf '\\n'
done
"""
JOURNALCTL = """\
#!/bin/sh
cat "{units}/journal" 2>/dev/null; exit 0
"""
RUNS = {"LoadState": "loaded", "ActiveState": "active", "SubState": "running", "Result": "success"}
LISTENS = {"LoadState": "loaded", "ActiveState": "active", "SubState": "running", "Result": "success"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Fleet:
    """What `apply` left on a machine, its systemd, and the programs that run there."""

    def __init__(self, folder: Path, authority: Authority, environment: dict[str, str]) -> None:
        self.folder, self.authority = folder, authority
        self.units, self.workers, self.tokens = folder / "units", folder / "workers", folder / "worker-tokens"
        for one in (self.units, self.workers, self.tokens, folder / "bin"):
            one.mkdir(parents=True)
        self.credentials = authority.host(folder / "credentials")
        (self.credentials / "hive-token").write_text(HIVE_TOKEN)
        (self.credentials / "token").write_text(WORKER_TOKEN)
        for name, text in (("systemctl", SYSTEMCTL), ("journalctl", JOURNALCTL)):
            program = folder / "bin" / name
            program.write_text(text.format(units=self.units))
            program.chmod(0o755)
        path = f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"
        self.environment = {**environment, "PATH": path, "CREDENTIALS_DIRECTORY": str(self.credentials)}
        self.processes: list[subprocess.Popen[Any]] = []

    def hive(self, *, tls: bool = True, notify: str = "", watchdog_s: float = 0, **fields: Any) -> RunningHive:
        """Start a hive from its settings file."""
        settings = {
            "name": "Machine-1",
            "host": "127.0.0.1",
            "port": free_port(),
            "token_file": "hive-token",
            "tls": CREDENTIALS if tls else None,
            "workers": str(self.workers),
            "worker_tokens": str(self.tokens),
            "authority": "ca.crt",
            **fields,
        }
        file = self.folder / "hive.yaml"
        file.write_text(dump_settings(HiveSettings(**settings)))
        home = Path(self.environment["RBEE_HOME"])
        home.mkdir(exist_ok=True)
        environment = {**self.environment, **({"NOTIFY_SOCKET": notify} if notify else {})}
        if watchdog_s:
            environment["WATCHDOG_USEC"] = str(round(watchdog_s * 1e6))
        with open(home / "hive.log", "a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "rbee.hive", "run", "--settings", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self.processes.append(process)
        return RunningHive(process, home, token=HIVE_TOKEN, tls=self.authority.trusted if tls else None)

    def declare(self, name: str, *, tls: bool = True, **fields: Any) -> WorkerSettings:
        """Write a worker's settings and token."""
        whole = {"model": "echo", "backend": "echo", "port": free_port(), "tls": CREDENTIALS if tls else None, **fields}
        settings = WorkerSettings(name=name, host="127.0.0.1", **whole)
        (self.tokens / name).write_text(WORKER_TOKEN)
        fresh = self.workers / f".{name}"
        fresh.write_text(dump_settings(settings))
        fresh.rename(self.workers / f"{name}.yaml")
        return settings

    def unit(self, name: str, suffix: str = "service", **properties: object) -> None:
        """Have systemd say this of a worker's unit."""
        text = "".join(f"{key}={value}\n" for key, value in properties.items())
        fresh = self.units / f".{name}"
        fresh.write_text(text)
        fresh.rename(self.units / f"rbee-worker@{name}.{suffix}")

    def run_worker(self, settings: WorkerSettings) -> subprocess.Popen[Any]:
        """Start a declared worker's process, as its unit does, and have systemd say so."""
        command = [
            sys.executable,
            "-m",
            "rbee.worker",
            "run",
            "--settings",
            str(self.workers / f"{settings.name}.yaml"),
        ]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.environment,
        )
        self.processes.append(process)
        self.unit(settings.name, "socket", **LISTENS)
        self.unit(settings.name, **RUNS, MainPID=process.pid, StatusText="ready")
        return process

    def end(self) -> None:
        """End every process."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            if process.stdout:
                process.stdout.close()


def report(hive: RunningHive) -> HiveReport:
    return hive.client.get("/v1/hive", HiveReport)


def reported(hive: RunningHive, name: str, *states: WorkerState) -> WorkerReport:
    """Return the report on a worker once it is in one of these states."""

    def found() -> WorkerReport | None:
        return next((one for one in report(hive).workers if one.name == name and one.state in states), None)

    try:
        worker: WorkerReport = until(found, f"{name} to be {states}")
    except AssertionError as problem:
        raise AssertionError(f"{problem}; there are {msgspec.to_builtins(report(hive).workers)}") from None
    return worker
