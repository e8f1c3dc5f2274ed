"""`rbee plan`: what an apply would do."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rbee.cli.apply import READ_ON, ApplyVerb, limit_option, wave_option
from rbee.cli.command import json_option

SAME, ERROR, CHANGES = 0, 1, 2


@click.command(
    "plan",
    cls=ApplyVerb,
    read_on=READ_ON,
    examples=[
        ("rbee plan inventory/", "Show what an apply would add, change and remove."),
        ("rbee plan inventory/ --out PLAN", "Keep it, for `rbee apply --plan PLAN`."),
    ],
)
@click.argument("inventory", type=click.Path(path_type=Path), default="inventory")
@limit_option
@wave_option
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Save the plan.")
@click.option("--no-diff", is_flag=True, help="Only the list of changes.")
@json_option
def command(
    inventory: Path, limit: tuple[str, ...], wave: int | None, out: Path | None, no_diff: bool, as_json: bool
) -> int:
    """Show what an apply would add, change and remove. Nothing is changed.

    Exit codes: 0 nothing to do, 2 changes, 1 an error on any host.
    """
    return look(inventory, limit, wave, out=out, diffs=not no_diff, as_json=as_json)


def look(
    inventory: Path, limit: tuple[str, ...], wave: int | None, *, out: Path | None, diffs: bool, as_json: bool
) -> int:
    """Observe, compare and show; return the exit code."""
    from rbee.apply.converge import Apply
    from rbee.cli.plan_view import plan_json, show_plan
    from rbee.cli.terminal import Waiting
    from rbee.paths import write_private

    with (
        Apply(inventory, limit=limit, wave=wave) as apply,
        Waiting(f"looking at {len(apply.hosts)} hosts", quiet=as_json),
    ):
        planned = apply.plan(lock=False)
    if as_json:
        click.echo(json.dumps(plan_json(planned), indent=2))
    else:
        show_plan(planned, diffs=diffs)
    if out is not None:
        write_private(out.absolute(), json.dumps(plan_json(planned)).encode())
    if planned.problems:
        return ERROR
    return CHANGES if planned.changed else SAME
