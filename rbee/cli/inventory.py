"""`rbee inventory`: check, show and draw the files that say which machines there are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rbee.cli.command import Group, Verb, json_option
from rbee.cli.inventory_folder import chosen, fleet, host_of, inventory_option
from rbee.errors import InvalidInventory

if TYPE_CHECKING:
    from rbee.inventory.fleet import Fleet

READ_ON = "docs/cli.md#rbee-inventory"


@click.group("inventory", cls=Group)
def command() -> None:
    """Check and show the files that say which machines there are.

    docs/inventory.md tells what they may say.
    """


@command.command(
    "check",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee inventory check", "List every mistake, with its file and line."),
        ("rbee inventory check fleet/ --no-exec", "Check files that you do not trust: no command in them is run."),
        ("rbee inventory check --json | jq .mistakes", "The same, for an editor or CI."),
    ],
)
@click.argument("path", required=False, type=click.Path(path_type=Path))
@inventory_option
@click.option("--no-exec", is_flag=True, help="Run no `Match exec` command: such blocks apply to no machine.")
@json_option
def check(path: Path | None, folder: Path | None, no_exec: bool, as_json: bool) -> int:
    """Find every mistake in an inventory, and ask ssh what it makes of it.

    Exit code 0: it can be applied; there may be warnings. Like ssh itself, it runs the commands of `Match exec`
    lines unless told not to.
    """
    from rbee.cli.inventory_check import examine

    found = examine(chosen(path or folder), run_commands=not no_exec)
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(found.as_data()), indent=2))
    else:
        found.show()
    return InvalidInventory.exit_code if found.mistakes else 0


@command.command(
    "show",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee inventory show", "List the machines."),
        ("rbee inventory show gaming-pc", "Show each value of a machine, and the line that it comes from."),
        ("rbee inventory show gaming-pc --json | jq .ssh.hostname", "What ssh and rbee make of it, for a script."),
    ],
)
@click.argument("host", required=False)
@inventory_option
@json_option
def show(host: str | None, folder: Path | None, as_json: bool) -> None:
    """Show the machines, or all that the inventory says of one."""
    from rbee.cli import inventory_tables

    known = fleet(folder)
    if as_json:
        import msgspec

        data = _host_data(known, host) if host else [_plain(each) for each in known.hosts]
        click.echo(msgspec.json.format(msgspec.json.encode(data), indent=2))
    elif host:
        inventory_tables.show_host(host_of(known, host))
    else:
        inventory_tables.show_hosts(known)


@command.command(
    "graph",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee inventory graph", "Draw the queen, the machines and their workers as a tree."),
        ("rbee inventory graph --dot | dot -Tsvg > fleet.svg", "The same as a picture, by Graphviz."),
    ],
)
@inventory_option
@click.option("--dot", is_flag=True, help="Print it for Graphviz.")
@json_option
def graph(folder: Path | None, dot: bool, as_json: bool) -> None:
    """Draw the queen, the machines and their workers as a tree."""
    from rbee.cli import inventory_graph

    tree = inventory_graph.tree(fleet(folder))
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(tree), indent=2))
    elif dot:
        click.echo(inventory_graph.dot(tree))
    elif sys.stdout.isatty():
        inventory_graph.draw(tree)
    else:
        click.echo("\n".join(inventory_graph.lines(tree)))


@command.command(
    "ssh-config",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee inventory ssh-config", 'Log in as rbee does, with: ssh -F "$(rbee inventory ssh-config)" gaming-pc'),
        ("rbee inventory ssh-config --print", "See what ssh is given."),
    ],
)
@inventory_option
@click.option("--print", "print_it", is_flag=True, help="Print the text, and write nothing.")
@json_option
def ssh_config(folder: Path | None, print_it: bool, as_json: bool) -> None:
    """Write one ssh_config that stands for the whole inventory, and print its path."""
    from rbee.inventory.ssh_config import ssh_config_text, write_ssh_config

    known = fleet(folder)
    text = ssh_config_text(known)
    path = "" if print_it else str(write_ssh_config(known))
    if as_json:
        import msgspec

        plain = text.encode(errors="surrogateescape").decode(errors="replace")
        click.echo(msgspec.json.format(msgspec.json.encode({"path": path or None, "text": plain}), indent=2))
    elif print_it:
        sys.stdout.buffer.write(text.encode(errors="surrogateescape"))
    else:
        click.echo(path)


@command.command(
    "keywords",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee inventory keywords", "Show every keyword of rbee's own."),
              ("rbee inventory keywords Worker", "Show one, with its keys.")],
)  # fmt: skip
@click.argument("name", required=False)
@json_option
def keywords(name: str | None, as_json: bool) -> None:
    """Show the keywords that rbee adds to those of OpenSSH."""
    from rbee.cli.inventory_tables import keyword_named, show_keyword, show_keywords
    from rbee.inventory.keywords import KEYWORDS, as_data

    chosen_ones = [keyword_named(name)] if name else list(KEYWORDS)
    if as_json:
        import msgspec

        names = {keyword.name for keyword in chosen_ones}
        data = [entry for entry in as_data() if entry["keyword"] in names]
        click.echo(msgspec.json.format(msgspec.json.encode(data), indent=2))
    elif name:
        show_keyword(chosen_ones[0])
    else:
        show_keywords(chosen_ones)


def _host_data(known: Fleet, name: str) -> dict[str, object]:
    from rbee.inventory.openssh import config_file, resolved

    host = host_of(known, name)
    with config_file(known) as config:
        values = resolved(config, [host.name])[host.name]
    return {"ssh": {key: found if len(found) > 1 else found[0] for key, found in values.items()}, "rbee": _plain(host)}


def _plain(value: object) -> object:
    import msgspec

    return msgspec.to_builtins(value)
