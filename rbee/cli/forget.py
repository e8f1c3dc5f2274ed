"""`rbee forget`: remove rbee from a machine, or a machine from what is known here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rbee.cli.command import Verb
from rbee.cli.inventory_folder import fleet, inventory_option
from rbee.cli.terminal import clean, size
from rbee.errors import HostUnreachable, InvalidInput

if TYPE_CHECKING:
    from rbee.apply.purge import Found
    from rbee.inventory.fleet import Fleet, Host

READ_ON = "docs/apply.md#take-a-machine-out"


@click.command(
    "forget",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee forget old-server --purge", "Stop and remove everything of rbee there; model files stay."),
        ("rbee forget old-server --purge --models --yes", "With the model files, and without a question."),
        ("rbee forget 192.168.1.102 --purge --as-user root", "A machine that the inventory does not name any more."),
        ("rbee forget old-server --offline", "The machine is gone: forget its host key here."),
    ],
)
@click.argument("host")
@click.option("--purge", is_flag=True, help="Stop and remove everything that rbee owns on the machine.")
@click.option("--models", is_flag=True, help="With --purge: also the model files.")
@click.option("--offline", is_flag=True, help="Only forget it here; the machine is not touched.")
@click.option("--as-user", metavar="USER", default="", help="Log in as USER, whatever the inventory says.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@inventory_option
def command(
    host: str, purge: bool, models: bool, offline: bool, as_user: str, yes: bool, folder: Path | None
) -> None:  # fmt: skip
    """Remove everything of rbee from a machine, or from what is known here: its host key in known_hosts.

    The machine need not be in the inventory any more, as long as ssh reaches it. Nothing else there is touched.
    """
    if purge == offline or (models and not purge):
        raise InvalidInput("Say either --purge or --offline (--models goes with --purge)", hint="rbee forget --help")
    known = fleet(folder)
    if purge:
        try:
            remove(known, host, models=models, yes=yes, user=as_user)
        except HostUnreachable as problem:
            hint = f"when it is gone for good: rbee forget {host} --offline"
            raise HostUnreachable(problem.host, problem.what, hint=hint) from None
    _forget_key(known, host)
    if offline:
        from rbee.apply.purge import note

        note(host, "forget", str(known.folder))
    declared = known.host(host)
    if declared is not None:
        click.echo(f"{declared.at} still names {host}: take it out, or the next apply brings it back.", err=True)
    if any(queen.name != host for queen in known.queens):
        click.echo(f"Then tell the queen: rbee apply {known.folder}", err=True)


def remove(known: Fleet, name: str, *, models: bool, yes: bool, user: str = "") -> None:
    """Show what would go from a machine, ask, and remove it. Raises: HostProblem, InvalidInput."""
    from rbee.apply.purge import find, note, purge
    from rbee.apply.ssh import Ssh
    from rbee.cli.apply import confirm
    from rbee.inventory.ssh_config import write_ssh_config

    with Ssh(write_ssh_config(known), user=user).session(known.host(name) or _stranger(name, user)) as session:
        found = find(session)
        _show(name, found, models=models)
        if found.is_empty(models=models):
            return
        if not yes:
            confirm()
        told = purge(session, models=models)
    note(name, "purge", str(known.folder))
    kept = f"; {', '.join(told['kept'])} stays" if told["kept"] else ""
    click.echo(f"Removed rbee from {name}{kept}.", err=True)


def _stranger(name: str, user: str) -> Host:
    from rbee.inventory.fleet import At, Host

    return Host(name=name, at=At("the command line", 1), hostname=name, user=user)


def _show(name: str, found: Found, *, models: bool) -> None:
    if found.is_empty(models=models):
        left = f" but {len(found.models)} model files, which --models removes" if found.models else ""
        click.echo(f"Nothing of rbee is on {name}{left}.")
        return
    click.secho(name, bold=True)
    for unit in found.units:
        _line("-", unit, "running" if unit in found.running else "")
    _line("-", f"releases ({found.releases}), settings, secrets, keys, logs", "/etc/rbee, /opt/rbee, /var/lib/rbee")
    if found.models:
        what = f"model files ({len(found.models)}, {size(found.models_bytes)})"
        _line(*(("-", what, "") if models else ("=", what, "kept; --models removes them")))


def _line(sign: str, what: str, about: str) -> None:
    mark = click.style(sign, fg="red" if sign == "-" else "green", bold=True)
    click.echo(f"  {mark} {clean(what)}{f'  ({clean(about)})' if about else ''}")


def _forget_key(known: Fleet, host: str) -> None:
    from rbee.apply.ssh import Ssh
    from rbee.inventory.known_hosts import change, name_of, pins, read_text, without
    from rbee.inventory.openssh import config_file, resolved
    from rbee.inventory.ssh_config import known_hosts, write_ssh_config

    Ssh(write_ssh_config(known)).hang_up(host)
    with config_file(known) as config:
        kept_as = name_of(resolved(config, [host])[host])
    path = known_hosts(known)
    found = pins(read_text(path), kept_as)
    if found:
        change(path, lambda text: without(text, kept_as))
        click.echo(f"Removed the key of {host} ({found[0].fingerprint}) from {path}.", err=True)
