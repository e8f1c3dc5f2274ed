"""How the machines of an inventory fare at this moment: by systemd, by their hives, and by each worker's own word."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from msgspec import Struct, structs

from rbee.apply.ssh import Ssh
from rbee.errors import HostUnreachable, RbeeError
from rbee.inventory.fleet import Fleet, Host, WorkerLine

ANSWER_LIMIT_S = 12.0
MOST_AT_ONCE = 64
READY, STARTING, FAILED, ABSENT, UNREACHABLE = "ready", "starting", "failed", "absent", "unreachable"


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """A declared worker. `unit` is systemd's word, `state` the worker's; `jobs` None: it did not say."""

    name: str
    unit: str
    state: str
    model: str
    port: int
    jobs: int | None = None
    memory_bytes: int = 0
    about: str = ""


class HostStatus(Struct, frozen=True, kw_only=True):
    """A machine: ready, starting, failed (something is not as declared), absent (nothing was applied), unreachable."""

    host: str
    address: str
    state: str
    about: str = ""
    hint: str = ""
    version: str = ""
    release: str = ""
    hive: str = ""
    """systemd's state of the hive; empty where none is declared."""
    queen: str = ""
    workers: list[WorkerStatus] = []


def look(fleet: Fleet, ssh: Ssh) -> list[HostStatus]:
    """Ask every machine side by side; one that does not answer holds up no other."""

    def ask(host: Host) -> HostStatus:
        workers = {worker.name: worker.port for worker in host.workers if not worker.url}
        try:
            with ssh.session(host) as session:
                told = session.ask("status", limit_s=ANSWER_LIMIT_S, hive_port=host.hive_port, workers=workers)
            found = host_status(host, told)
            hint = f"rbee apply {fleet.folder} --limit {host.name}" if found.state == ABSENT else ""
            return structs.replace(found, hint=hint)
        except RbeeError as problem:
            state = UNREACHABLE if isinstance(problem, HostUnreachable) else FAILED
            what = getattr(problem, "what", problem.message)
            return HostStatus(host=host.name, address=host.hostname, state=state, about=what, hint=problem.hint or "")

    with ThreadPoolExecutor(max_workers=min(MOST_AT_ONCE, len(fleet.hosts) or 1)) as pool:
        return list(pool.map(ask, fleet.hosts))


def host_status(host: Host, told: Mapping[str, Any]) -> HostStatus:
    """Return what a host's agent said, against what is declared. Pure."""
    units, hive = told["units"], told["hive"]
    reports = {worker["name"]: worker for worker in hive.get("workers", [])}
    workers = [
        _worker(line, units, reports.get(line.name, {}), told["health"].get(line.name, {}))
        for line in host.workers
        if not line.url
    ]
    services = {
        name: _active(units, f"rbee-{name}.service")
        for name, port in (("hive", host.hive_port), ("queen", host.queen_port))
        if port
    }
    state, about = _judged(services, bool(hive), workers, bool(units))
    return HostStatus(
        host=host.name,
        address=host.hostname,
        state=state,
        about=about,
        version=str(hive.get("version", "")),
        release=told["current"],
        hive=services.get("hive", ""),
        queen=services.get("queen", ""),
        workers=workers,
    )


def _worker(
    line: WorkerLine, units: Mapping[str, Any], report: Mapping[str, Any], health: Mapping[str, Any]
) -> WorkerStatus:
    unit = _active(units, f"rbee-worker@{line.name}.service")
    own = {"loading": STARTING}.get(health.get("status", ""), health.get("status", ""))
    # Of a unit that has ended the hive's word may be older than systemd's.
    told = "" if unit in ("inactive", "failed") else report.get("state", "")
    ended = "failed" if unit == "failed" else "stopped"
    state = own or told or (STARTING if unit == "activating" else ended)
    return WorkerStatus(
        name=line.name,
        unit=unit,
        state=state,
        model=line.model,
        port=line.port,
        jobs=health.get("in_flight"),
        memory_bytes=int(report.get("memory_bytes", 0)),
        about=str(health.get("reason") or report.get("reason") or ""),
    )


def _judged(services: Mapping[str, str], hive: bool, workers: list[WorkerStatus], known: bool) -> tuple[str, str]:
    if not known:
        return ABSENT, "nothing of rbee is there"
    down = {name: state for name, state in services.items() if state not in ("active", "activating", "reloading")}
    if down:
        return FAILED, ", ".join(f"its {name} is {state}" for name, state in down.items())
    if "hive" in services and not hive:
        return (STARTING, "its hive starts") if services["hive"] != "active" else (FAILED, "its hive does not answer")
    troubled = [worker.name for worker in workers if worker.state not in (READY, STARTING, "draining")]
    if troubled:
        return FAILED, f"not ready: {', '.join(troubled)}"
    waiting = [worker.name for worker in workers if worker.state != READY]
    if waiting or "activating" in services.values():
        return STARTING, f"starting: {', '.join(waiting)}" if waiting else "its services start"
    return READY, ""


def _active(units: Mapping[str, Any], unit: str) -> str:
    return str(units.get(unit, {}).get("ActiveState", "absent"))
