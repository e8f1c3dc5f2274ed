"""Carries plans out with pyinfra. The one file that touches `pyinfra.api`, and a short-lived process of its own:
pyinfra's templates, host keys and state belong to a process, and it needs gevent's patches before any other import.

`python -m rbee.apply.engine` reads batches of plans from standard input, one JSON document a line, and writes what
happens to standard output, one JSON event a line.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import sys  # noqa: E402
from types import ModuleType  # noqa: E402


def _without_paramiko() -> None:
    """Stand in for paramiko, which pyinfra imports for its own ssh connector and for the names of two exceptions.

    It would take half of this process' start, and nothing here connects by it.
    """
    stand_in = ModuleType("paramiko")
    stand_in.PKey = type("PKey", (), {})  # type: ignore[attr-defined]
    stand_in.SSHException = type("SSHException", (Exception,), {})  # type: ignore[attr-defined]
    sys.modules["paramiko"] = stand_in


_without_paramiko()

import contextlib  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
from collections.abc import Callable  # noqa: E402
from enum import Enum  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import msgspec  # noqa: E402
from pyinfra.api import Config, Inventory, State  # noqa: E402
from pyinfra.api import inventory as pyinfra_inventory  # noqa: E402
from pyinfra.api.connect import connect_all  # noqa: E402
from pyinfra.api.exceptions import PyinfraError  # noqa: E402
from pyinfra.api.operations import run_host_op  # noqa: E402
from pyinfra.api.state import StateStage  # noqa: E402
from pyinfra.context import ctx_config, ctx_host, ctx_inventory, ctx_state  # noqa: E402

from rbee.apply.batch import Batch, Member, decode  # noqa: E402
from rbee.apply.connector import AHEAD, PREPARED, RbeeConnector  # noqa: E402
from rbee.apply.ssh import Ssh  # noqa: E402
from rbee.apply.templates import shipped  # noqa: E402
from rbee.lifeline import die_with_parent  # noqa: E402

Emit = Callable[[str, dict[str, Any]], None]


def main() -> None:
    """Carry out one batch after the other until the input ends."""
    logging.getLogger("pyinfra").setLevel(logging.CRITICAL + 1)
    # Ctrl+C goes to the whole group: the controller decides what becomes of this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(os.getppid(), signal.SIGKILL)
    output = os.dup(1)
    os.dup2(2, 1)  # pyinfra and its libraries may print; the events have this descriptor to themselves

    def emit(host: str, event: dict[str, Any]) -> None:
        data = msgspec.json.encode({"host": host, **event}) + b"\n"
        with contextlib.suppress(OSError):  # the controller is gone
            while data:
                data = data[os.write(output, data) :]

    for line in sys.stdin.buffer:
        if not line.endswith(b"\n"):
            return  # the controller died while it wrote
        batch = decode(line)
        if batch.members:
            carry_out(batch, emit)
            emit("", {"event": "batch-done"})
        else:
            _connect_ahead(batch)


def _connect_ahead(batch: Batch) -> None:
    """Have the agents start on hosts that are likely to be worked on, while the controller still plans."""
    ssh = Ssh(Path(batch.ssh_config), sockets=Path(batch.sockets))
    for host in batch.holders:
        AHEAD[host.name] = ssh.session(host)


def _connectors() -> dict[str, type[RbeeConnector]]:
    return {"rbee": RbeeConnector, "ssh": RbeeConnector}


def carry_out(batch: Batch, emit: Emit) -> None:
    """Connect to all, then execute, the first host alone before the others. One that hangs holds up no other.

    A canary that fails is the end of its wave; one that is unreachable hands over to the next host.
    """
    PREPARED.clear()
    ssh = Ssh(Path(batch.ssh_config), sockets=Path(batch.sockets))
    others = {member.host.name: member.host for member in batch.members} | {h.name: h for h in batch.holders}
    for member in batch.members:
        PREPARED[member.host.name] = _data(member, ssh, others, emit)
    # pyinfra would import every connector there is.
    pyinfra_inventory.get_all_connectors = _connectors
    pyinfra_inventory.get_execution_connectors = _connectors
    inventory = Inventory(([f"@rbee/{name}" for name in PREPARED], {}))
    state = State(inventory, Config(CONNECT_TIMEOUT=batch.connect_limit_s), check_for_changes=False)
    state.cwd = str(shipped("deploys").parent)
    ctx_state.set(state)
    ctx_inventory.set(inventory)
    ctx_config.set(state.config.copy())
    _connect(state, emit)
    _prepare_and_execute(state, emit)
    for host in list(state.activated_hosts):
        host.disconnect()
    while AHEAD:
        AHEAD.popitem()[1].close()


def _data(member: Member, ssh: Ssh, others: dict[str, Any], emit: Emit) -> dict[str, Any]:
    name = member.host.name
    return {
        "rbee_host": member.host,
        "rbee_hosts": others,
        "rbee_plan": member.plan,
        "rbee_ssh": ssh,
        "rbee_event": lambda event: emit(name, event),
    }


def _connect(state: State, emit: Emit) -> None:
    state.set_stage(StateStage.Connect)
    with contextlib.suppress(PyinfraError):  # "No hosts remaining!" is told for each of them
        connect_all(state)
    for host in state.inventory:
        if host not in state.activated_hosts:
            emit(host.name, {"event": "result", "ok": False, "reachable": False})


def _prepare_and_execute(state: State, emit: Emit) -> None:
    state.set_stage(StateStage.Prepare)
    deploys = _deploys()
    left = [host for host in state.inventory if host in state.activated_hosts and _prepare(state, host, deploys, emit)]
    state.set_stage(StateStage.Execute)
    state.is_executing = True
    while left:
        canary = left.pop(0)
        outcome = _execute(state, canary, emit)
        if outcome is Went.FAILED:
            for host in left:
                emit(host.name, {"event": "skipped", "why": f"{canary.name}, the first of its wave, failed"})
            return
        if outcome is Went.WELL:
            break
    assert state.pool is not None
    for job in [state.pool.spawn(_execute, state, host, emit) for host in left]:
        job.join()


class Went(Enum):
    """How a host's operations ended."""

    WELL = 1
    FAILED = 2
    LOST = 3


def _deploys() -> list[Callable[[], Any]]:
    """Return the roles' deploys; the folder is the person's to read and change, so it is no part of the package."""
    root = str(shipped("deploys").parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    from deploys.base import base
    from deploys.hive import hive
    from deploys.queen import queen
    from deploys.worker import worker

    return [base, queen, hive, worker]


def _prepare(state: State, host: Any, deploys: list[Callable[[], Any]], emit: Emit) -> bool:
    """Collect a host's operations; return whether that went well."""
    try:
        with ctx_config.use(state.config.copy()), ctx_host.use(host):
            for deploy in deploys:
                deploy()
    except Exception as problem:  # noqa: BLE001  a deploy is the person's code; the other hosts go on
        emit(host.name, {"event": "problem", "what": f"{type(problem).__name__}: {problem}", "code": "host_failed"})
        emit(host.name, {"event": "result", "ok": False, "reachable": True})
        return False
    return True


def _execute(state: State, host: Any, emit: Emit) -> Went:
    """Run one host's operations in their order, up to the first that fails.

    pyinfra's own loop waits for every host after every operation, and its other one loses failures.
    """
    ok = False
    try:
        with ctx_config.use(state.config.copy()), ctx_host.use(host):
            ok = all(run_host_op(state, host, op_hash) for op_hash in host.op_hash_order)
    except Exception as problem:  # noqa: BLE001  as above
        emit(host.name, {"event": "problem", "what": f"{type(problem).__name__}: {problem}", "code": "host_failed"})
    emit(host.name, {"event": "result", "ok": ok, "reachable": True})
    if ok:
        return Went.WELL
    return Went.LOST if host.connector.problem == "host_unreachable" else Went.FAILED


if __name__ == "__main__":
    main()
