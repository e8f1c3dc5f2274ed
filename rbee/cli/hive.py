"""`rbee hive`: install a hive on a machine, look at the machines, or run a hive here."""

from __future__ import annotations

import time
from pathlib import Path

import click

from rbee.cli import local_queen
from rbee.cli.command import Group, Verb, json_option
from rbee.cli.door import Door
from rbee.cli.inventory_folder import chosen, fleet, host_of, inventory_option
from rbee.errors import NotFound
from rbee.wire.fleet import HiveView

READ_ON = "docs/cli.md#rbee-hive"
LISTED_LIMIT_S = 15.0


@click.group("hive", cls=Group)
def command() -> None:
    """Install a hive on a machine, look at the machines, or run a hive on this one.

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


@command.command(
    "install",
    cls=Verb,
    read_on="docs/apply.md",
    examples=[
        ("rbee hive install gaming-pc", "Bring a machine of ~/.config/rbee/hives.conf into the fleet."),
        ("rbee hive install gaming-pc --yes -i fleet/", "Without a question, from another inventory."),
    ],
)
@click.argument("host")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@inventory_option
@click.pass_obj
def install(door: Door, host: str, yes: bool, folder: Path | None) -> int:
    """Install a hive on a machine of the inventory, over ssh, with all that is declared for it.

    It is `rbee apply` for one machine. The queen of this machine lists it at once when she reads that inventory.
    """
    from rbee.apply.converge import Apply
    from rbee.cli.apply import CONVERGED, bring

    with Apply(chosen(folder)) as apply:
        apply.hosts = [host_of(apply.fleet, host)]
        code = bring(apply, yes=yes)
        if code == CONVERGED and not apply.fleet.queens:
            _await_listed(door, host)
        return code


@command.command(
    "uninstall",
    cls=Verb,
    read_on="docs/apply.md#take-a-machine-out",
    examples=[("rbee hive uninstall gaming-pc", "Stop and remove everything of rbee there; model files stay.")],
)
@click.argument("host")
@click.option("--models", is_flag=True, help="Also the model files.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@inventory_option
def uninstall(host: str, models: bool, yes: bool, folder: Path | None) -> None:
    """Stop and remove everything of rbee on a machine of the inventory, over ssh.

    The inventory keeps it: `rbee hive install` brings it back. `rbee forget` is for a machine that leaves for good.
    """
    from rbee.cli.forget import remove

    known = fleet(folder)
    remove(known, host_of(known, host).name, models=models, yes=yes)


def _await_listed(door: Door, host: str) -> None:
    """Say how the queen of this machine sees a hive that was just installed."""
    if not door.url and local_queen.find() is None:
        click.echo("No queen runs here: rbee queen start")
        return
    deadline = time.monotonic() + LISTED_LIMIT_S
    with door.client() as client:
        while True:
            view = next((hive for hive in client.get("/v1/hives", list[HiveView]) if hive.hive == host), None)
            if view is not None and view.state == "ready":
                click.echo(f"The queen at {client.url} lists {host}: {view.state}")
                return
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
    what = f"{view.state}: {view.reason}" if view else "she reads another inventory"
    click.echo(f"The queen at {client.url} does not see {host} as ready ({what})", err=True)


def _hives(door: Door) -> list[HiveView]:
    with door.client() as client:
        return client.get("/v1/hives", list[HiveView])


def _print(hives: list[HiveView]) -> None:
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(hives), indent=2))
