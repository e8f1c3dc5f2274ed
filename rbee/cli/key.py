"""`rbee key`: make and revoke API keys."""

from __future__ import annotations

import datetime
import time
from typing import TYPE_CHECKING, Any

import click

from rbee.cli.command import Group, Verb, json_option
from rbee.cli.door import Door
from rbee.cli.terminal import table
from rbee.errors import NotSupported

if TYPE_CHECKING:
    from rbee.queen.keys import Key, KeyStore

READ_ON = "docs/cli.md#rbee-key"
DAY_S = 86400.0


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
@click.pass_obj
def create(door: Door, name: str, admin: bool, days: float | None, quiet: bool) -> None:
    """Make a key and print it; it is shown this once."""
    from rbee.queen.keys import ADMIN, INFERENCE

    scopes = frozenset({INFERENCE, ADMIN} if admin else {INFERENCE})
    key, secret = _store(door).create(name, scopes=scopes, expires_at=time.time() + days * DAY_S if days else None)
    click.echo(secret)
    if not quiet:
        click.echo(f"This is shown once. Revoke it with: rbee key revoke {key.id}", err=True)


@command.command("list", cls=Verb, read_on=READ_ON, examples=[("rbee key list", "Show every key, without its secret.")])
@json_option
@click.pass_obj
def list_(door: Door, as_json: bool) -> None:
    """List the keys; their secrets are not kept."""
    keys = _store(door).list()
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode([_facts(key) for key in keys]), indent=2))
        return
    table(
        ("id", "name", "state", "may", "created", "expires"),
        ((k.id, k.name, k.state, ", ".join(sorted(k.scopes)), _day(k.created_at), _day(k.expires_at)) for k in keys),
    )


@command.command(
    "revoke",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee key revoke 1a2B3c4D", "Make a key useless from the next request on.")],
)
@click.argument("key_id", metavar="ID")
@click.pass_obj
def revoke(door: Door, key_id: str) -> None:
    """Make a key useless from the next request on."""
    key = _store(door).revoke(key_id)
    click.echo(f"Revoked {key.id} ({key.name}).", err=True)


def _store(door: Door) -> KeyStore:
    if door.url:
        raise NotSupported(
            "Keys are made on the queen's own machine",
            hint=f"ssh to it, then: {click.get_current_context().command_path} …",
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
