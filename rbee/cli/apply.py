"""`rbee apply`: bring every machine of an inventory to what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rbee.cli.command import Verb, json_option
from rbee.errors import InvalidInput, RbeeError

if TYPE_CHECKING:
    from rbee.apply.converge import Apply, Planned
    from rbee.apply.execute import Outcome

READ_ON = "docs/apply.md"
CONVERGED, FAILED, PARTLY = 0, 1, 3

limit_option = click.option(
    "--limit", "-l", multiple=True, metavar="PATTERN", help="Only hosts whose name or tag matches; may be repeated."
)
wave_option = click.option("--wave", type=int, metavar="N", help="Only hosts of this RbeeWave.")


class ApplyVerb(Verb):
    """A verb whose errors all end with 1: its 2 and 3 say what it found."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RbeeError as problem:
            problem.exit_code = FAILED  # type: ignore[misc]  # of this one alone
            raise


@click.command(
    "apply",
    cls=ApplyVerb,
    read_on=READ_ON,
    examples=[
        ("rbee apply inventory/", "Show what would change, ask, and do it."),
        ("rbee apply inventory/ --yes --limit 'gpu-*'", "Without a question, on some of the hosts."),
        ("rbee apply inventory/ --plan PLAN", "Do what `rbee plan --out PLAN` has shown, or nothing."),
    ],
)
@click.argument("inventory", type=click.Path(path_type=Path), default="inventory")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@limit_option
@wave_option
@click.option("--yes-prune", is_flag=True, help="Also when more than half of a host's workers would be removed.")
@click.option("--plan", "saved", type=click.Path(path_type=Path), metavar="FILE", help="Refuse when a host has moved.")
@json_option
def command(
    inventory: Path, yes: bool, limit: tuple[str, ...], wave: int | None, yes_prune: bool, saved: Path | None,
    as_json: bool,
) -> int:  # fmt: skip
    """Bring every machine of an inventory to what it says.

    INVENTORY is ./inventory unless given. Exit codes: 0 every host converged, 1 an error before anything was done, 3
    some hosts failed or were unreachable.
    """
    from rbee.apply.converge import Apply

    with Apply(inventory, limit=limit, wave=wave) as apply:
        return bring(apply, yes=yes, yes_prune=yes_prune, saved=saved, as_json=as_json)


def bring(apply: Apply, *, yes: bool, yes_prune: bool = False, saved: Path | None = None, as_json: bool = False) -> int:
    """Plan, ask, execute, verify and tell; return the exit code."""
    from rbee.apply.converge import check_saved
    from rbee.cli.plan_view import show_plan
    from rbee.cli.terminal import Waiting

    with Waiting(f"looking at {len(apply.hosts)} hosts", quiet=as_json):
        planned = apply.plan(lock=True, patient=not yes or saved is not None)
    if saved is not None:
        check_saved(json.loads(saved.read_text()), planned)
    if not as_json:
        show_plan(planned)
    check_prunes(planned, allowed=yes_prune)
    if planned.changed and not yes:
        confirm(as_json=as_json)
    code = carry_out(apply, planned, yes_prune=yes_prune, as_json=as_json)
    if not as_json and code == CONVERGED:
        _say_where(apply)
    return code


def _say_where(apply: Apply) -> None:
    for queen in apply.fleet.queens:
        name = f"[{queen.hostname}]" if ":" in queen.hostname else queen.hostname
        click.echo(f"Queen: http://{name}:{queen.queen_port}/v1, with a key: rbee key create NAME --host {queen.name}")


def carry_out(apply: Apply, planned: Planned, *, yes_prune: bool = False, as_json: bool) -> int:
    """Execute, verify and tell; return the exit code. Hosts that were late come after the others."""
    from rbee.apply.verify import verify
    from rbee.cli.plan_view import plan_json, show_outcomes, show_plan

    outcomes = _execute(apply, planned, as_json=as_json)
    if planned.late:
        late = apply.plan_late()
        if not as_json:
            show_plan(late)
        check_prunes(late, allowed=yes_prune)
        outcomes |= _execute(apply, late, as_json=as_json)
        planned.add(late)
    if planned.changed:
        verify(apply, outcomes)
    if as_json:
        import msgspec

        report = {"plan": plan_json(planned), "outcomes": msgspec.to_builtins(outcomes)}
        click.echo(json.dumps(report, indent=2))
    else:
        show_outcomes(outcomes.values())
    apply.note(outcomes)
    good = sum(1 for outcome in outcomes.values() if outcome.state == "converged")
    return CONVERGED if good == len(outcomes) else PARTLY


def _execute(apply: Apply, planned: Planned, *, as_json: bool) -> dict[str, Outcome]:
    from rbee.cli.plan_view import Live

    with Live(list(planned.changed), quiet=as_json) as live:
        return apply.execute(planned, live.event)


def confirm(*, as_json: bool = False) -> None:
    """Ask whether to go on. Raises: InvalidInput where nobody can be asked, Abort for a no."""
    if as_json or not sys.stdin.isatty():
        raise InvalidInput("There is no terminal to ask at", hint="--yes")
    click.confirm("Do that?", abort=True)


def check_prunes(planned: Planned, *, allowed: bool) -> None:
    """Raise: InvalidInput when a plan removes most of what a host runs, which mostly is a mistake."""
    most = [name for name, plan in planned.plans.items() if plan.prunes_most]
    if most and not allowed:
        plan = planned.plans[most[0]]
        raise InvalidInput(
            f"{most[0]} would lose {plan.units_removed} of its {plan.units_before} workers", hint="--yes-prune"
        )
