"""`rbee logs`: what a machine's services wrote."""

from __future__ import annotations

from pathlib import Path

import click

from rbee.cli.command import Verb
from rbee.cli.inventory_folder import fleet, host_of, inventory_option
from rbee.cli.terminal import clean

READ_ON = "docs/apply.md#look-at-a-machine"


@click.command(
    "logs",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee logs gaming-pc", "Show the last lines of everything that rbee runs there."),
        ("rbee logs gaming-pc llama -f", "Go on as a worker's lines come, until Ctrl+C."),
        ("rbee logs gaming-pc hive --since '10 min ago' -n 1000", "Look at a stretch of time."),
    ],
)
@click.argument("host")
@click.argument("what", metavar="[WORKER|queen|hive]", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come, until Ctrl+C.")
@click.option(
    "-n", "--lines", metavar="N", type=click.IntRange(0, 1_000_000), default=100, show_default=True,
    help="How many lines.",
)  # fmt: skip
@click.option("--since", metavar="TIME", default="", help="Only from then on, as journalctl takes it: '1 hour ago'.")
@inventory_option
def command(host: str, what: str | None, follow: bool, lines: int, since: str, folder: Path | None) -> None:
    """Show what a machine's services wrote, from its journal: all of them, or one by its name."""
    from rbee.apply.journal import journal, units_of
    from rbee.apply.ssh import Ssh
    from rbee.inventory.ssh_config import write_ssh_config

    known = fleet(folder)
    machine = host_of(known, host)
    units = units_of(machine, what)
    for line in journal(Ssh(write_ssh_config(known)), machine, units, lines=lines, follow=follow, since=since):
        click.echo(clean(line))
