"""The end of an apply: the queen must list what was brought up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rbee.apply.execute import Outcome
from rbee.apply.ssh import Session
from rbee.errors import HostProblem
from rbee.inventory.fleet import Host

if TYPE_CHECKING:
    from rbee.apply.converge import Apply

LIMIT_S = 20.0
LOOK_EVERY_S = 0.2
RECORD = "/var/lib/rbee/queen/state/queen.json"


def verify(apply: Apply, outcomes: dict[str, Outcome]) -> None:
    """Wait until the queen of the inventory lists every converged host's workers as ready, and say what she does not.

    Units and workers' own health were seen to by each host's transaction. Without a queen there is nothing to ask.
    """
    queens = [host for host in apply.fleet.queens if outcomes.get(host.name, _absent(host)).state == "converged"]
    done = {
        host.name: [service.name for service in apply.survey.wanted[host.name].services if service.role == "worker"]
        for host in apply.hosts
        if outcomes[host.name].state == "converged" and outcomes[host.name].changes
    }
    for queen in queens:
        try:
            missing = _await(apply.session(queen), queen, done)
        except HostProblem as problem:
            missing = {queen.name: f"its queen cannot be asked: {problem.what}"}
        for name, what in missing.items():
            outcomes[name].state, outcomes[name].problem = "failed", what


def _absent(host: Host) -> Outcome:
    return Outcome(host.name, "skipped")


def _await(session: Session, queen: Host, workers: Mapping[str, list[str]]) -> dict[str, str]:
    deadline = time.monotonic() + LIMIT_S
    while True:
        missing = _missing(queen_status(session, queen), workers)
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(LOOK_EVERY_S)


def queen_status(session: Session, queen: Host) -> dict[str, Any]:
    """Ask the queen for her status, on her own host. Raises: HostProblem."""
    import json

    record = json.loads(session.ask("read", path=RECORD)["text"] or "{}")
    door = {"port": queen.queen_port, "tls": False, "token": record.get("token", "")}
    answer = session.ask("call", door=door, method="GET", path="/v1/orchestrator/status")
    body: dict[str, Any] = answer["body"] if answer["status"] == 200 else {}
    return body


def _missing(status: dict[str, Any], workers: Mapping[str, list[str]]) -> dict[str, str]:
    """Return, by host, what the queen does not list; `workers` are the names that she should list of each."""
    views = {view["hive"]: view for view in status.get("hives", [])}
    missing: dict[str, str] = {}
    for host, names in workers.items():
        view = views.get(host)
        if view is None or view["state"] not in ("online", "ready", "ok"):
            why = next((p["message"] for p in status.get("problems", []) if host in p["where"]), "no report yet")
            missing[host] = f"the queen does not see its hive: {why}"
            continue
        states = {worker["name"]: worker["state"] for worker in view["workers"]}
        late = [name for name in names if states.get(name) != "ready"]
        if late:
            missing[host] = f"the queen does not list as ready: {', '.join(late)}"
    return missing
