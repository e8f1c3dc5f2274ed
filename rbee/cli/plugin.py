"""`rbee plugin`: the installed engines."""

from __future__ import annotations

import subprocess
import sys

import click
import msgspec

from rbee.cli.command import Group, Verb, json_option
from rbee.errors import PluginProblem
from rbee.wire.fleet import EngineReport

READ_ON = "docs/cli.md#rbee-plugin"
CHECK_TIMEOUT_S = 120.0


@click.group("plugin", cls=Group)
def command() -> None:
    """Show the installed engines and what each can do."""


@command.command(
    "list",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee plugin list", "Show each engine, and why one cannot be used."),
        ("rbee plugin list --json", "Show each engine's options too."),
    ],
)
@json_option
def list_(as_json: bool) -> None:
    """List the engines of this machine, and why one cannot be used."""
    found = engines()
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
        return
    if not found:
        click.echo("No engine is installed. Try: pip install rbee-xllamacpp", err=True)
        return
    from rbee.cli.fleet_tables import show_engines

    show_engines(found)


def engines() -> list[EngineReport]:
    """Return the installed engines; they are loaded in another process, which a broken one may crash.

    Raises: PluginProblem.
    """
    arguments = [sys.executable, "-P", "-m", "rbee.worker", "plugins", "--json"]
    try:
        done = subprocess.run(arguments, capture_output=True, timeout=CHECK_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise PluginProblem(f"The engines were not checked within {CHECK_TIMEOUT_S:g} s", hint="rbee doctor") from None
    try:
        return msgspec.json.decode(done.stdout, type=list[EngineReport])
    except msgspec.DecodeError:
        words = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise PluginProblem(
            f"The engines could not be checked: {words}", hint="python -m rbee.worker plugins"
        ) from None
