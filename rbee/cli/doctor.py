"""`rbee doctor`: check this machine, and say what to try."""

from __future__ import annotations

import dataclasses
import sys

import click

from rbee.cli.checks import FAIL, Check, all_checks
from rbee.cli.command import Verb, json_option
from rbee.cli.terminal import COLOURS, clean


@click.command(
    "doctor",
    cls=Verb,
    read_on="docs/cli.md#rbee-doctor",
    examples=[
        ("rbee doctor", "Look at everything that rbee needs."),
        ("rbee doctor --json | jq '.[] | select(.state != \"ok\")'", "See what is not well, in a script."),
    ],
)
@json_option
def command(as_json: bool) -> int:
    """Check this machine, and say what to try; exit with 1 when something fails.

    It starts nothing and changes nothing.
    """
    found = []
    for check in all_checks():
        found.append(check)
        if not as_json:
            _show(check)
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode([dataclasses.asdict(check) for check in found]), indent=2))
    return 1 if any(check.state == FAIL for check in found) else 0


def _show(check: Check) -> None:
    from rich.text import Text

    from rbee.cli.terminal import console

    console().print(Text(f"{check.state:<5}", style=COLOURS[check.state]) + f"{check.name}: {clean(check.seen)}")
    if check.hint:
        click.echo(f"     try: {clean(check.hint)}")
    sys.stdout.flush()
