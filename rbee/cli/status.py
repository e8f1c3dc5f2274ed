"""`rbee status`: every machine of the inventory, its services and workers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from rbee.cli import local_queen
from rbee.cli.command import Verb, json_option
from rbee.cli.door import Door
from rbee.cli.inventory_folder import chosen
from rbee.cli.terminal import console, size, table
from rbee.errors import HostProblem, RbeeError

if TYPE_CHECKING:
    from rbee.apply.ssh import Ssh
    from rbee.apply.status import HostStatus
    from rbee.inventory.fleet import Fleet
    from rbee.wire.fleet import QueenStatus

READ_ON = "docs/apply.md#look-at-a-machine"
ALL_READY, NOT_READY, UNREACHABLE = 0, 1, 3


@click.command(
    "status",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee status", "Show the machines of ./inventory (or ~/.config/rbee) and how they fare."),
        ("rbee status fleet/ --json | jq -r '.hosts[] | select(.state != \"ready\").host'", "Name those in trouble."),
    ],
)
@click.argument("inventory", required=False, type=click.Path(path_type=Path))
@json_option
@click.pass_context
def command(ctx: click.Context, inventory: Path | None, as_json: bool) -> int:
    """Show every machine of the inventory, its services and workers, and what the queen sees.

    INVENTORY is ./inventory unless given, else ~/.config/rbee; without any it is `rbee queen status`. Exit codes: 0
    all is ready, 1 something is not, 3 a machine is unreachable.
    """
    folder = chosen(inventory)
    if inventory is None and not any(folder.glob("*.conf")):
        from rbee.cli.queen import status

        ctx.invoke(status, as_json=as_json)
        return ALL_READY
    return _show(folder, ctx.obj, as_json=as_json)


def _show(folder: Path, door: Door, *, as_json: bool) -> int:
    from rbee.apply.ssh import Ssh
    from rbee.apply.status import look
    from rbee.inventory import read
    from rbee.inventory.ssh_config import write_ssh_config

    fleet = read(folder)
    ssh = Ssh(write_ssh_config(fleet))
    hosts = look(fleet, ssh)
    queen, problem = _queen(fleet, ssh, hosts, door)
    if as_json:
        data = {"hosts": hosts, "queen": queen, "problem": problem}
        click.echo(msgspec.json.format(msgspec.json.encode(data), indent=2))
    else:
        _tables(hosts, queen, problem)
    if any(host.state == "unreachable" for host in hosts):
        return UNREACHABLE
    return ALL_READY if not problem and all(host.state == "ready" for host in hosts) else NOT_READY


def _queen(fleet: Fleet, ssh: Ssh, hosts: list[HostStatus], door: Door) -> tuple[QueenStatus | None, str]:
    """Return how the inventory's queen sees the fleet, or the one of this machine; and why she cannot be asked."""
    from rbee.apply.verify import queen_status
    from rbee.wire.fleet import QueenStatus

    states = {host.host: host.state for host in hosts}
    for host in fleet.queens:
        if states[host.name] in ("unreachable", "absent"):
            return None, f"The queen's machine {host.name} is {states[host.name]}"
        try:
            with ssh.session(host) as session:
                told: dict[str, Any] = queen_status(session, host)
            if not told:
                return None, f"The queen on {host.name} refuses her own host's token"
            url = f"http://{host.hostname}:{host.queen_port}"
            return msgspec.structs.replace(msgspec.convert(told, QueenStatus), url=url), ""
        except HostProblem as problem:
            return None, f"The queen on {host.name} cannot be asked: {problem.what}"
    if not door.url and local_queen.find() is None:
        return None, ""
    try:
        with door.client() as client:
            return client.get("/v1/orchestrator/status", QueenStatus), ""
    except RbeeError as problem:
        return None, str(problem)


def _tables(hosts: list[HostStatus], queen: QueenStatus | None, problem: str) -> None:
    table(
        ("host", "address", "state", "hive", "queen", "version", "release", "about"),
        ((h.host, h.address, h.state, h.hive, h.queen, h.version, h.release, h.about) for h in hosts),
    )
    if any(host.workers for host in hosts):
        click.echo()
        table(
            ("worker", "host", "unit", "state", "model", "port", "jobs", "memory", "about"),
            (
                (
                    w.name,
                    h.host,
                    w.unit,
                    w.state,
                    w.model,
                    w.port,
                    "" if w.jobs is None else w.jobs,
                    size(w.memory_bytes) if w.memory_bytes else "",
                    w.about,
                )
                for h in hosts
                for w in h.workers
            ),
        )
    for host in hosts:
        if host.hint:
            console().print(f"{host.host}: try: {host.hint}")
    if problem:
        console().print(problem, style="red")
    if queen is not None:
        _queen_view(queen)


def _queen_view(queen: QueenStatus) -> None:
    from rbee.cli.fleet_tables import show_hives, show_problems

    click.echo(f"\nThe queen at {queen.url} ({queen.in_flight} in flight) sees:")
    show_hives(queen.hives)
    show_problems(queen.problems)
