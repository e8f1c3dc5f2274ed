"""An inventory: text in, a fleet out. No network, no pyinfra."""

from __future__ import annotations

from pathlib import Path

from rbee.inventory.fleet import Fleet
from rbee.inventory.world import World

__all__ = ["Fleet", "read"]


def read(path: Path, world: World | None = None) -> Fleet:
    """Return the fleet of a folder's `*.conf` files, in the order of their names, or of one file.

    Raises: InvalidInventory with every mistake in them; NotFound when there is no such folder or file.
    """
    from rbee.errors import InvalidInventory
    from rbee.inventory.files import digest, inventory_files
    from rbee.inventory.parse import parse
    from rbee.inventory.resolve import Resolver, fleet_of, in_order
    from rbee.inventory.world import remembering, this_machine

    world = remembering(world or this_machine())
    folder, files = inventory_files(path)
    config = parse(files, world)
    resolver = Resolver(config, world)
    fleet = fleet_of(config, resolver, folder, digest(folder, config.texts))
    if resolver.mistakes:
        raise InvalidInventory(in_order(resolver.mistakes, config), fleet.warnings)
    return fleet
