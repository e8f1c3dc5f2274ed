"""`rbee drift`: what was changed on the machines since the last apply."""

from __future__ import annotations

from pathlib import Path

import click

from rbee.cli.apply import READ_ON, ApplyVerb, limit_option
from rbee.cli.command import json_option


@click.command(
    "drift",
    cls=ApplyVerb,
    read_on=READ_ON,
    examples=[("rbee drift inventory/", "Show what was stopped, edited or removed by hand.")],
)
@click.argument("inventory", type=click.Path(path_type=Path), default="inventory")
@limit_option
@json_option
def command(inventory: Path, limit: tuple[str, ...], as_json: bool) -> int:
    """Show what was changed on the machines by hand: where they differ from INVENTORY. Nothing is changed.

    Exit codes: 0 no drift, 2 drift, 1 an error on any host.
    """
    from rbee.cli.plan import look

    return look(inventory, limit, None, out=None, diffs=True, as_json=as_json)
