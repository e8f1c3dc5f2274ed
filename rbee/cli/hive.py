"""`rbee hive`: look at the machines, or run a hive on this one."""

from __future__ import annotations

import click

from rbee.cli.command import Group, Verb, json_option
from rbee.cli.door import Door
from rbee.errors import NotFound
from rbee.wire.fleet import HiveView

READ_ON = "docs/cli.md#rbee-hive"


@click.group("hive", cls=Group)
def command() -> None:
    """Look at the machines, or run a hive on this one.

    A hive is the agent of one machine. On a machine with a queen it runs by itself.
    """


@command.command("list", cls=Verb, read_on=READ_ON, examples=[("rbee hive list", "Show every machine.")])
@json_option
@click.pass_obj
def list_(door: Door, as_json: bool) -> None:
    """List the machines; exit with 3 when no queen runs."""
    hives = _hives(door)
    if as_json:
        _print(hives)
        return
    from rbee.cli.fleet_tables import show_hives

    show_hives(hives)


@command.command(
    "status",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee hive status", "Show each machine with its engines, models and workers."),
        ("rbee hive status gaming-pc --json", "Show one machine, for a script."),
    ],
)
@click.argument("name", required=False)
@json_option
@click.pass_obj
def status(door: Door, name: str | None, as_json: bool) -> None:
    """Show one machine, or every one, in full; exit with 3 when no queen runs."""
    hives = _hives(door)
    chosen = [hive for hive in hives if name in (None, hive.hive)]
    if not chosen:
        known = ", ".join(hive.hive for hive in hives) or "none"
        raise NotFound(f"There is no hive {name!r}; known: {known}", hint="rbee hive list")
    if as_json:
        _print(chosen)
        return
    from rbee.cli.fleet_tables import show_engines, show_hives, show_models, show_workers

    show_hives(chosen)
    for hive in chosen:
        click.echo(f"\n{hive.hive} at {hive.url}")
        show_engines(hive.engines)
        click.echo()
        show_models([hive])
        if hive.workers:
            click.echo()
            show_workers([hive])


@command.command(
    "run",
    cls=Verb,
    read_on=READ_ON,
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h"]},
    examples=[
        ("rbee hive run --queen http://192.168.1.5:7833", "Run a hive in the foreground, for a queen elsewhere."),
        ("rbee hive run --help", "See every option."),
    ],
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> None:
    """Run this machine's hive in the foreground."""
    from rbee.cli.programs import become, hive_arguments

    become("rbee.hive", ["run", *hive_arguments(arguments)])


def _hives(door: Door) -> list[HiveView]:
    with door.client() as client:
        return client.get("/v1/hives", list[HiveView])


def _print(hives: list[HiveView]) -> None:
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(hives), indent=2))
