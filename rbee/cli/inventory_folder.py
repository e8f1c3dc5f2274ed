"""Which inventory a command means."""

from __future__ import annotations

from pathlib import Path

import click

from rbee.errors import NotFound
from rbee.inventory.fleet import Fleet, Host

inventory_option = click.option(
    "-i",
    "--inventory",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The inventory's folder, or one file (default: ./inventory, else ~/.config/rbee).",
)


def chosen(folder: Path | None) -> Path:
    """Return the folder that is meant when none, or this one, was named."""
    from rbee.paths import config_dir

    here = Path("inventory")
    return folder or (here if here.is_dir() else config_dir())


def fleet(folder: Path | None, *, run_commands: bool = True) -> Fleet:
    """Read the inventory. Raises: InvalidInventory, NotFound."""
    from rbee.inventory import read
    from rbee.inventory.world import this_machine

    return read(chosen(folder), this_machine(run_commands=run_commands))


def host_of(known: Fleet, name: str) -> Host:
    """Return a machine of the fleet. Raises: NotFound with the nearest names."""
    import difflib

    host = known.host(name)
    if host is None:
        names = [each.name for each in known.hosts]
        near = difflib.get_close_matches(name, names, n=2)
        hint = " or ".join(near) or (f"one of {', '.join(names[:10])}" if names else "a Host block, docs/inventory.md")
        raise NotFound(f"The inventory {known.folder} has no machine {name!r}", hint=hint)
    return host
