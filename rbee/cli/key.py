"""`rbee key`: make and revoke API keys."""

from __future__ import annotations

import datetime
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rbee.cli.command import Group, Verb, json_option
from rbee.cli.door import Door
from rbee.cli.inventory_folder import fleet, host_of, inventory_option
from rbee.cli.terminal import clean, table
from rbee.errors import HostFailed, NotSupported

if TYPE_CHECKING:
    from rbee.queen.keys import Key, KeyStore

READ_ON = "docs/cli.md#rbee-key"
DAY_S = 86400.0
QUEEN_HOME, PROGRAM = "/var/lib/rbee/queen", "/opt/rbee/current/bin/rbee"

host_option = click.option(
    "--host", metavar="HOST", help="At the queen of this machine of the inventory, over ssh (default: here)."
)


@click.group("key", cls=Group)
def command() -> None:
    """Make and revoke API keys. On this machine no key is needed; from other machines one always is."""


@command.command(
    "create",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee key create laptop --expires 90", "Make a key for 90 days."),
        ("export OPENAI_API_KEY=$(rbee key create zed -q)", "Put a new key where editors look for it."),
        ("rbee key create laptop --host queen-1", "Make a key at the queen that `rbee apply` set up there."),
    ],
)
@click.argument("name")
@click.option("--admin", is_flag=True, help="Also allow control of the fleet: workers, models, shutdown.")
@click.option(
    "--expires",
    "days",
    metavar="DAYS",
    type=click.FloatRange(0, 36500, min_open=True),
    help="Make it useless after so many days.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print the key and nothing else.")
@host_option
@inventory_option
@click.pass_obj
def create(
    door: Door, name: str, admin: bool, days: float | None, quiet: bool, host: str | None, folder: Path | None
) -> int:
    """Make a key and print it; it is shown this once."""
    if host is not None:
        words = [*(["--admin"] if admin else []), *(["--expires", f"{days:g}"] if days else [])]
        return _there(host, folder, ["create", *words, *(["--quiet"] if quiet else []), "--", name])
    from rbee.queen.keys import ADMIN, INFERENCE

    scopes = frozenset({INFERENCE, ADMIN} if admin else {INFERENCE})
    key, secret = _store(door).create(name, scopes=scopes, expires_at=time.time() + days * DAY_S if days else None)
    click.echo(secret)
    if not quiet:
        click.echo(f"This is shown once. Revoke it with: rbee key revoke {key.id}", err=True)
    return 0


@command.command("list", cls=Verb, read_on=READ_ON, examples=[("rbee key list", "Show every key, without its secret.")])
@host_option
@inventory_option
@json_option
@click.pass_obj
def list_(door: Door, host: str | None, folder: Path | None, as_json: bool) -> int:
    """List the keys; their secrets are not kept."""
    if host is not None:
        return _there(host, folder, ["list", *(["--json"] if as_json else [])])
    keys = _store(door).list()
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode([_facts(key) for key in keys]), indent=2))
        return 0
    table(
        ("id", "name", "state", "may", "created", "expires"),
        ((k.id, k.name, k.state, ", ".join(sorted(k.scopes)), _day(k.created_at), _day(k.expires_at)) for k in keys),
    )
    return 0


@command.command(
    "revoke",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee key revoke 1a2B3c4D", "Make a key useless from the next request on.")],
)
@click.argument("key_id", metavar="ID")
@host_option
@inventory_option
@click.pass_obj
def revoke(door: Door, key_id: str, host: str | None, folder: Path | None) -> int:
    """Make a key useless from the next request on."""
    if host is not None:
        return _there(host, folder, ["revoke", "--", key_id])
    key = _store(door).revoke(key_id)
    click.echo(f"Revoked {key.id} ({key.name}).", err=True)
    return 0


def _there(name: str, folder: Path | None, words: list[str]) -> int:
    """Have `rbee key` run on a queen's machine, as the user that she runs as: the keys' file must stay that user's."""
    from rbee.apply.journal import run_as_root
    from rbee.apply.ssh import Ssh
    from rbee.inventory.ssh_config import write_ssh_config

    known = fleet(folder)
    host = host_of(known, name)
    if not host.queen_port:
        queens = " or ".join(queen.name for queen in known.queens)
        raise NotSupported(f"No queen runs on {name}", hint=f"--host {queens}" if queens else "QueenPort in a Host")
    own = ["runuser", "-u", host.run_as, "--", "env", f"RBEE_HOME={QUEEN_HOME}", PROGRAM, "key", *words]
    done = run_as_root(Ssh(write_ssh_config(known)), host, own, limit_s=60.0)
    if done.returncode and not done.stderr.startswith("rbee:"):
        what = done.stderr.strip() or f"its `rbee key` ended with {done.returncode}"
        raise HostFailed(name, what, hint=f"rbee apply {known.folder} --limit {name}")
    click.echo(clean(done.stdout), nl=False)
    hinted = re.sub(r"\brbee key (revoke|list)", rf"rbee key \1 --host {name}", clean(done.stderr))
    click.echo(hinted, err=True, nl=False)
    return done.returncode


def _store(door: Door) -> KeyStore:
    if door.url:
        raise NotSupported(
            "Keys are made on the queen's own machine",
            hint=f"{click.get_current_context().command_path} … --host HOST, for a machine of the inventory",
        )
    from rbee.paths import state_dir
    from rbee.queen.keys import KeyStore

    return KeyStore(state_dir() / "keys.sqlite")


def _facts(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "state": key.state,
        "scopes": sorted(key.scopes),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }


def _day(moment: float | None) -> str:
    if moment is None:
        return "never"
    return datetime.datetime.fromtimestamp(moment, tz=datetime.UTC).astimezone().strftime("%Y-%m-%d %H:%M")
