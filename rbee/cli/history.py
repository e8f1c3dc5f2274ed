"""`rbee history`: what was applied from here, or to one machine."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import click

from rbee.cli.command import Verb, json_option
from rbee.cli.inventory_folder import chosen, fleet, host_of, inventory_option
from rbee.cli.terminal import table

READ_ON = "docs/apply.md#rollback"


@click.command(
    "history",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee history", "List what was applied from this machine."),
        ("rbee history gaming-pc", "List what was done on a machine, by whom, and what it can go back to."),
        ("rbee history gaming-pc --json | jq -r '.states[-1].name'", "Use the present state's name in a script."),
    ],
)
@click.argument("host", required=False)
@click.option(
    "-n", "--lines", metavar="N", type=click.IntRange(1, 10_000), default=20, show_default=True, help="How many."
)
@inventory_option
@json_option
def command(host: str | None, lines: int, folder: Path | None, as_json: bool) -> None:
    """Show what was applied, and what can be gone back to.

    Without HOST it is the log of this machine; with HOST, that machine's own log and its states.

    Each apply leaves a state on the machines that it changed; `rbee rollback HOST --to STATE` goes back to it.
    """
    if host is None:
        from rbee.apply.records import read_log

        _show_log(read_log(lines), as_json=as_json)
        return
    told = _ask(chosen(folder), host, lines)
    if as_json:
        _print(told)
        return
    _show_host(told)


def _ask(folder: Path, name: str, lines: int) -> dict[str, Any]:
    from rbee.apply.records import state_of
    from rbee.apply.ssh import Ssh
    from rbee.inventory.ssh_config import write_ssh_config

    known = fleet(folder)
    host = host_of(known, name)
    with Ssh(write_ssh_config(known)).session(host) as session:
        told = session.ask("history", lines=lines)
    states = [state_of(name) for name in sorted(told["states"])]
    return {"host": name, "audit": told["audit"], "states": [{f: getattr(s, f) for f in FIELDS} for s in states]}


FIELDS = ("name", "revision", "at")


def _show_log(entries: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        _print(entries)
        return
    table(
        ("when", "who", "what", "revision", "hosts", "inventory"),
        (
            (
                when(entry.get("at", 0)),
                entry.get("who", ""),
                entry.get("what", "apply"),
                entry.get("revision", ""),
                _counts(entry.get("hosts", {})),
                entry.get("inventory", ""),
            )
            for entry in entries
        ),
    )


def _show_host(told: dict[str, Any]) -> None:
    table(
        ("when", "who", "what", "revision", "part", "changed", "about"),
        (
            (
                when(line.get("at", 0)),
                line.get("who", ""),
                line.get("what", "apply"),
                line.get("revision", ""),
                line.get("role", ""),
                ", ".join(unit.removeprefix("rbee-").removesuffix(".service") for unit in line.get("changed", [])),
                line.get("error", ""),
            )
            for line in told["audit"]
        ),
    )
    click.echo("\nStates, for rbee rollback --to:")
    last = len(told["states"]) - 1
    table(
        ("state", "applied", "about"),
        ((s["name"], local(s["at"]), "the present one" if i == last else "") for i, s in enumerate(told["states"])),
    )


def _counts(hosts: dict[str, list[Any]]) -> str:
    """Return how many hosts ended how, the troubled ones by name."""
    states = [outcome[0] for outcome in hosts.values()]
    words = [f"{states.count('converged')} converged"] if "converged" in states else []
    words += [f"{name} {outcome[0]}" for name, outcome in hosts.items() if outcome[0] != "converged"]
    return ", ".join(words)


def when(moment: float) -> str:
    """Return a time as a person here reads it."""
    return datetime.datetime.fromtimestamp(moment, tz=datetime.UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def local(moment: str) -> str:
    """Return a time in ISO 8601 as a person here reads it."""
    return datetime.datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M:%S") if moment else ""


def _print(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2))
