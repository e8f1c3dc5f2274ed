"""`rbee hosts`: which machines' host keys the inventory pins. Nothing connects to a machine whose key it does not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rbee.cli.command import Group, Verb, json_option
from rbee.cli.inventory_folder import fleet, host_of, inventory_option
from rbee.errors import InvalidInput, NotFound, SetupProblem

if TYPE_CHECKING:
    from rbee.inventory.fleet import Fleet
    from rbee.inventory.host_key import Seen
    from rbee.inventory.openssh import ConfigFile, Values

READ_ON = "docs/cli.md#rbee-hosts"


@click.group("hosts", cls=Group)
def command() -> None:
    """List the machines of the inventory, and say whose host keys are trusted.

    Nothing connects to a machine whose key is not pinned; docs/inventory.md tells how keys are kept.
    """


@command.command(
    "list",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee hosts list", "Show each machine, its address, and whether its key is pinned.")],
)
@inventory_option
@json_option
def list_(folder: Path | None, as_json: bool) -> None:
    """List the machines, with the fingerprints of their pinned host keys."""
    from rbee.cli.inventory_tables import address
    from rbee.cli.terminal import table
    from rbee.inventory.known_hosts import name_of, pins, read_text
    from rbee.inventory.openssh import config_file, resolved
    from rbee.inventory.ssh_config import known_hosts

    known = fleet(folder)
    with config_file(known) as config:
        said = resolved(config, [host.name for host in known.hosts])
    text = read_text(known_hosts(known))
    rows = [(host, [pin.fingerprint for pin in pins(text, name_of(said[host.name]))]) for host in known.hosts]
    if as_json:
        import msgspec

        data = [{"host": host.name, "address": address(host), "keys": found} for host, found in rows]
        click.echo(msgspec.json.format(msgspec.json.encode(data), indent=2))
        return
    table(
        ("host", "address", "trusted", "key", "from"),
        ((host.name, address(host), "yes" if found else "no", ", ".join(found), host.at) for host, found in rows),
    )


@command.command(
    "trust",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee hosts trust gaming-pc", "Show the key of a machine, ask, and pin it."),
        ("rbee hosts trust gaming-pc --fingerprint SHA256:q2Fh…", "Pin it if it is the one that you were told of."),
        ("rbee hosts trust gaming-pc mac-studio --yes", "Pin whatever keys they show, on a network that you trust."),
    ],
)
@click.argument("names", metavar="HOST...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--fingerprint", metavar="SHA256:…", default="", help="The fingerprint that the key must have.")
@inventory_option
def trust(names: tuple[str, ...], yes: bool, fingerprint: str, folder: Path | None) -> None:
    """Pin the host key of machines, after showing its fingerprint.

    Compare it with what the machine itself says: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub
    """
    from rbee.inventory.host_key import look
    from rbee.inventory.openssh import config_file

    known = fleet(folder)
    if fingerprint and len(names) > 1:
        raise InvalidInput("--fingerprint is for one machine", hint="one rbee hosts trust for each")
    with config_file(known) as config:
        for name in names:
            said = _resolved(known, config, name)
            kept_as = _kept_as(said)
            _judge(known, name, kept_as, look(known, config, name, kept_as), yes, fingerprint)


@command.command(
    "forget",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee hosts forget gaming-pc", "Take its key out, before you trust the new one of a new installation.")],
)
@click.argument("name", metavar="HOST")
@inventory_option
def forget(name: str, folder: Path | None) -> None:
    """Take a machine's host key out of the inventory; nothing connects to it until it is trusted again."""
    from rbee.inventory.known_hosts import change, pins, read_text, without
    from rbee.inventory.openssh import config_file
    from rbee.inventory.ssh_config import known_hosts

    known = fleet(folder)
    with config_file(known) as config:
        kept_as = _kept_as(_resolved(known, config, name))
    path = known_hosts(known)
    found = pins(read_text(path), kept_as)
    if not found:
        raise NotFound(f"{path} has no key of {name} ({kept_as})", hint="rbee hosts list")
    change(path, lambda text: without(text, kept_as))
    click.echo(f"Removed the key of {name} ({found[0].fingerprint}) from {path}.", err=True)


def _resolved(known: Fleet, config: ConfigFile, name: str) -> Values:
    """Return what ssh makes of a machine of the fleet, or of a jump host of one."""
    from rbee.inventory.openssh import resolved

    if known.host(name) is None:
        said = resolved(config, [host.name for host in known.hosts])
        if name not in [hop for values in said.values() for hop in _hops(values)]:
            host_of(known, name)
    return resolved(config, [name])[name]


def _hops(values: Values) -> list[str]:
    """Return the names of the jump hosts on the way: [USER@]HOST[:PORT], separated by commas."""
    hops = values.get("proxyjump", ["none"])[0].removeprefix("ssh://").split(",")
    return [hop.rpartition("@")[2].partition(":")[0] for hop in hops]


def _kept_as(values: Values) -> str:
    from rbee.inventory.known_hosts import name_of

    return name_of(values)


def _judge(known: Fleet, name: str, kept_as: str, seen: Seen, yes: bool, fingerprint: str) -> None:
    """Pin the key that a machine showed, or say why not."""
    from rbee.inventory.known_hosts import change
    from rbee.inventory.ssh_config import known_hosts

    path = known_hosts(known)
    if seen.changed:
        raise SetupProblem(
            f"{name} ({kept_as}) shows another key, {seen.changed}, than the pinned one, {seen.pinned[0].fingerprint}: "
            "it was installed anew, or someone stands between",
            hint=f"if you know why: rbee hosts forget {name}, then rbee hosts trust {name}",
        )
    if fingerprint and fingerprint.removeprefix("SHA256:") != seen.fingerprint.removeprefix("SHA256:"):
        raise SetupProblem(f"The key of {name} is {seen.fingerprint}, not {fingerprint}; it was not pinned")
    if not seen.new:
        click.echo(f"{name} is trusted already: {seen.fingerprint}", err=True)
        return
    if not (yes or fingerprint):
        _ask(name, kept_as, seen)
    change(path, lambda text: text + ("" if not text or text.endswith("\n") else "\n") + seen.new + "\n")
    click.echo(f"Pinned {seen.fingerprint} for {name} in {path}.", err=True)


def _ask(name: str, kept_as: str, seen: Seen) -> None:
    from rbee.cli.terminal import clean

    kind = clean(seen.new.split()[1])
    click.echo(f"{name} ({clean(kept_as)}) shows this {kind} key:\n  {seen.fingerprint}", err=True)
    if _known_to_person(kept_as, seen):
        click.echo("  It is the one in your ~/.ssh/known_hosts.", err=True)
    if not sys.stdin.isatty():
        raise InvalidInput(f"No one is here to say whether the key of {name} is right",
                           hint=f"--fingerprint {seen.fingerprint}, or --yes")  # fmt: skip
    click.confirm("Pin it?", abort=True, err=True)


def _known_to_person(kept_as: str, seen: Seen) -> bool:
    from rbee.inventory.known_hosts import pins, read_text

    file = Path.home() / ".ssh" / "known_hosts"
    return any(pin.fingerprint == seen.fingerprint for pin in pins(read_text(file), kept_as))
