"""`rbee rollback`: bring machines back to what an earlier apply brought them to."""

from __future__ import annotations

from pathlib import Path

import click

from rbee.cli.command import Verb, json_option
from rbee.cli.inventory_folder import chosen, host_of, inventory_option
from rbee.errors import NotFound

READ_ON = "docs/apply.md#rollback"


@click.command(
    "rollback",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee rollback", "Undo the last apply, on every machine that it touched."),
        ("rbee rollback gaming-pc --to 4f2a91c03b7d", "Bring one machine back to a revision of the inventory."),
        ("rbee rollback gaming-pc --yes", "Undo the last apply on one machine, without a question."),
    ],
)
@click.argument("host", required=False)
@click.option("--to", metavar="REV", default="", help="A state or revision, as `rbee history HOST` lists them.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@inventory_option
@json_option
def command(host: str | None, to: str, yes: bool, folder: Path | None, as_json: bool) -> int:
    """Bring machines back to what an earlier apply brought them to: one, or every one.

    Without --to: to the state before the last apply. It comes from the machine's own memory, with the settings and
    the release of then; the inventory is not changed. Exit codes are those of `rbee apply`.
    """
    from rbee.apply.converge import Apply
    from rbee.apply.rollback import Rollback
    from rbee.cli.apply import carry_out, confirm
    from rbee.cli.plan_view import show_plan

    with Apply(chosen(folder)) as apply:
        if host is not None:
            apply.hosts = [host_of(apply.fleet, host)]
        apply.survey = survey = Rollback.of(apply.survey, to)
        planned = apply.plan(lock=True)
        for problem in planned.problems.values():
            if isinstance(problem, NotFound):
                raise problem
        if not as_json:
            show_plan(planned)
            for name, why in survey.left.items():
                click.echo(f"{name} stays as it is: {why}")
        if planned.changed and not yes:
            confirm(as_json=as_json)
        code = carry_out(apply, planned, as_json=as_json)
        if planned.changed and not as_json:
            click.echo(f"The inventory is as it was: `rbee plan {apply.fleet.folder}` shows what an apply would redo.")
        return code
