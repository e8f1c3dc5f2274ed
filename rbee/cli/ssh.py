"""`rbee ssh`: a shell or a command on a machine of the inventory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from rbee.cli.command import Verb
from rbee.cli.inventory_folder import fleet, host_of, inventory_option
from rbee.errors import SetupProblem

READ_ON = "docs/apply.md#look-at-a-machine"


@click.command(
    "ssh",
    cls=Verb,
    read_on=READ_ON,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    examples=[
        ("rbee ssh gaming-pc", "Log in."),
        ("rbee ssh gaming-pc -- nvidia-smi -L", "Run a command; its exit code is passed on."),
        ("rbee ssh gaming-pc -- journalctl -u rbee-hive > hive.log", "Keep its output here."),
    ],
)
@inventory_option
@click.argument("host")
@click.argument("words", metavar="[COMMAND]...", nargs=-1, type=click.UNPROCESSED)
def command(folder: Path | None, host: str, words: tuple[str, ...]) -> None:
    """Log in to a machine of the inventory, or run a command there.

    It becomes ssh itself, with the inventory's configuration and host keys; options of rbee stand before HOST.
    """
    from rbee.inventory.ssh_config import write_ssh_config

    known = fleet(folder)
    host_of(known, host)
    rest = words[1:] if words[:1] == ("--",) else words
    terminal = ["-t"] if rest and sys.stdin.isatty() and sys.stdout.isatty() else []
    line = ["ssh", "-F", str(write_ssh_config(known)), *terminal, "--", host, *rest]
    sys.stdout.flush()
    try:
        os.execvp("ssh", line)
    except FileNotFoundError:
        raise SetupProblem("There is no ssh program here", hint="apt-get install openssh-client") from None
