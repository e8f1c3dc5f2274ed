"""What a declared worker's unit and its own word say together: the worker's state. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from rbee.hive.units import Unit, outcome, service
from rbee.wire.fleet import WorkerHealth, WorkerState

SILENCE_S = 3.0
"""How long a worker whose unit is active may not answer before it counts as failed."""
BY_WORD = {
    "loading": WorkerState.STARTING,
    "ready": WorkerState.READY,
    "draining": WorkerState.DRAINING,
    "failed": WorkerState.FAILED,
}
FAILED = "failed: "


@dataclass(frozen=True)
class Seen:
    """One look at a declared worker. `problem` is why its health is not known."""

    name: str
    port: int
    unit: Unit
    socket: Unit
    health: WorkerHealth | None = None
    problem: str = ""
    refused: bool = False
    """It answers, but not as this fleet's worker: another certificate, token or name."""
    silent_s: float = 0.0
    last_words: str = ""
    port_taken: bool = False


def judge(seen: Seen, before: WorkerState) -> tuple[WorkerState, str]:
    """Return a worker's state and the reason for it.

    | unit (systemd)                 | its own word (`/health`) | state                                       |
    |--------------------------------|--------------------------|---------------------------------------------|
    | not loaded                     |                          | failed: it is not installed                 |
    | socket failed                  |                          | failed: its port is taken                   |
    | inactive                       |                          | stopped                                     |
    | failed, or waits for a restart |                          | failed: how it ended                        |
    | deactivating                   |                          | draining                                    |
    | activating, active             | loading, ready, …        | that word                                   |
    | activating                     | none                     | starting                                    |
    | active                         | none                     | as before for 3 s, then failed: it is silent|
    | unknown                        | any                      | that word; without one, failed              |
    """
    unit = seen.unit
    if not unit.load:
        return _by_word(seen) if seen.health else (WorkerState.FAILED, seen.problem or "systemd does not know it")
    if unit.load != "loaded":
        return WorkerState.FAILED, f"{service(seen.name)} cannot be used ({unit.load}); rbee apply installs it"
    if seen.socket.active == "failed" and not unit.runs:
        return WorkerState.FAILED, _port_words(seen)
    if unit.active == "failed" or unit.sub == "auto-restart":
        return WorkerState.FAILED, _ending(seen)
    if unit.active == "inactive":
        return WorkerState.STOPPED, f"systemctl start {service(seen.name)} starts it"
    if unit.active == "deactivating":
        return (WorkerState.DRAINING, "") if unit.result == "success" else (WorkerState.FAILED, _ending(seen))
    if seen.health is not None:
        return _by_word(seen)
    if seen.refused:
        return WorkerState.FAILED, seen.problem
    if unit.active == "activating":
        return WorkerState.STARTING, ""
    if seen.silent_s < SILENCE_S and before in (WorkerState.READY, WorkerState.DRAINING, WorkerState.STARTING):
        return before, ""
    return WorkerState.FAILED, seen.problem


def _by_word(seen: Seen) -> tuple[WorkerState, str]:
    assert seen.health is not None
    return BY_WORD.get(seen.health.status, WorkerState.FAILED), seen.health.reason


def _ending(seen: Seen) -> str:
    """How a worker ended: its own last words where it had any, and systemd's."""
    said = seen.unit.status_text.removeprefix(FAILED) if seen.unit.status_text.startswith(FAILED) else seen.last_words
    how = outcome(seen.unit)
    again = "; systemd starts it again" if seen.unit.sub == "auto-restart" else ""
    return (f"{said} ({how})" if said else how) + again


def _port_words(seen: Seen) -> str:
    if seen.port_taken:
        return f"port {seen.port} is taken by another program; find it with: ss -ltnp 'sport = :{seen.port}'"
    return f"systemd cannot listen on port {seen.port} ({outcome(seen.socket)})"
