"""`rbee key`: make and revoke API keys."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rbee.cli.command import Group, Verb, json_option
from rbee.cli.door import Door
from rbee.cli.inventory_folder import fleet, host_of, inventory_option
from rbee.cli.terminal import clean, table
from rbee.errors import HostFailed, InvalidInput, NotSupported

if TYPE_CHECKING:
    from rbee.queen.keys import Key, KeyStore

READ_ON = "docs/cli.md#rbee-key"
DAY_S = 86400.0
QUEEN_HOME, PROGRAM = "/var/lib/rbee/queen", "/opt/rbee/current/bin/rbee"

host_option = click.option(
    "--host", metavar="HOST", help="At the queen of this machine of the inventory, over ssh (default: here)."
)


F = TypeVar("F", bound=Callable[..., Any])
LIMITS = {
    "requests_per_minute": "Requests a minute.",
    "tokens_per_minute": "Tokens a minute, read and written.",
    "concurrency": "Jobs at once.",
    "requests_per_day": "Requests a day (UTC).",
    "tokens_per_day": "Tokens a day.",
    "requests_per_month": "Requests a month.",
    "tokens_per_month": "Tokens a month.",
}


def policy_options(verb: F) -> F:
    """Give a verb the options of what a key allows; it takes them as `told`."""
    for name, text in reversed(LIMITS.items()):
        flag = "--" + name.replace("_", "-")
        verb = click.option(flag, name, metavar="N", type=click.IntRange(0, 2**53), help=f"{text} 0: no limit.")(verb)
    choices = click.Choice(["interactive", "normal", "batch"])
    for option in (
        click.option("--priority", type=choices, help="Its jobs' priority, and the most urgent that they may ask for."),
        click.option("--model", "models", multiple=True, metavar="NAME", help="Only this model or pattern: 'qwen*'."),
        click.option("--tier", metavar="NAME", help="What routing scripts see as customer_tier."),
        click.option("--tenant", metavar="NAME", help="Whose key it is; its metrics are apart from other tenants'."),
        click.option(
            "--scope",
            "scopes",
            multiple=True,
            type=click.Choice(["inference", "metrics", "admin"]),
            help="What it is for (default: inference).",
        ),
    ):
        verb = option(verb)
    return verb


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
        (
            "rbee key create acme --tenant acme --requests-per-minute 60 --tokens-per-month 5000000",
            "Make a customer's key, with a rate and a budget.",
        ),
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
@policy_options
@click.option("-q", "--quiet", is_flag=True, help="Print the key and nothing else.")
@host_option
@inventory_option
@click.pass_obj
def create(
    door: Door,
    /,
    name: str,
    admin: bool,
    days: float | None,
    quiet: bool,
    host: str | None,
    folder: Path | None,
    scopes: tuple[str, ...],
    **told: Any,
) -> int:
    """Make a key and print it; it is shown this once."""
    if host is not None:
        words = [*(["--admin"] if admin else []), *(["--expires", f"{days:g}"] if days else []), *_words(scopes, told)]
        return _there(host, folder, ["create", *words, *(["--quiet"] if quiet else []), "--", name])
    from rbee.queen.keys import ADMIN, INFERENCE
    from rbee.queen.policy import policy_of

    key, secret = _store(door).create(
        name,
        scopes=frozenset({*(scopes or [INFERENCE]), *([ADMIN] if admin else [])}),
        expires_at=time.time() + days * DAY_S if days else None,
        policy=policy_of(_given(told)),
    )
    click.echo(secret)
    if not quiet:
        click.echo(f"This is shown once. Revoke it with: rbee key revoke {key.id}", err=True)
    return 0


@command.command(
    "show",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee key show 1a2B3c4D", "Show what a key allows.")],
)
@click.argument("key_id", metavar="ID")
@host_option
@inventory_option
@json_option
@click.pass_obj
def show(door: Door, key_id: str, host: str | None, folder: Path | None, as_json: bool) -> int:
    """Show what a key allows; its secret is not kept."""
    if host is not None:
        return _there(host, folder, ["show", *(["--json"] if as_json else []), "--", id_of(key_id)])
    facts = _facts(_store(door).get(id_of(key_id)))
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(facts), indent=2))
        return 0
    for moment in ("created_at", "expires_at", "revoked_at"):
        facts[moment] = _day(facts[moment])
    table(("field", "value"), ((name, _shown(name, value)) for name, value in facts.items()))
    return 0


@command.command(
    "set",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee key set 1a2B3c4D --tokens-per-minute 20000", "Change one limit; the others stay."),
        ("rbee key set 1a2B3c4D --expires 0 --model '*'", "Let it live for ever, and use every model."),
    ],
)
@click.argument("key_id", metavar="ID")
@click.option(
    "--expires", "days", metavar="DAYS", type=click.FloatRange(0, 36500), help="From this moment on. 0: never."
)
@policy_options
@host_option
@inventory_option
@click.pass_obj
def set_(
    door: Door,
    /,
    key_id: str,
    days: float | None,
    host: str | None,
    folder: Path | None,
    scopes: tuple[str, ...],
    **told: Any,
) -> int:
    """Change what a key allows, from the next request on. What is not named stays as it is."""
    if host is not None:
        expires = ["--expires", f"{days:g}"] if days is not None else []
        return _there(host, folder, ["set", *expires, *_words(scopes, told), "--", id_of(key_id)])
    fields = _given(told)
    if not fields and not scopes and days is None:
        raise InvalidInput("Nothing to change was named", hint="rbee key set --help")
    import msgspec

    key = _store(door).change(
        id_of(key_id),
        scopes=frozenset(scopes) or None,
        expires_at=msgspec.UNSET if days is None else time.time() + days * DAY_S if days else None,
        policy=fields,
    )
    click.echo(f"Changed {key.id} ({key.name}).", err=True)
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
    if not keys:
        click.echo("There is no key yet: rbee key create NAME", err=True)
    table(
        ("id", "name", "state", "tenant", "may", "created", "expires"),
        (
            (
                key.id,
                key.name,
                key.state,
                key.policy.tenant,
                ", ".join(sorted(key.scopes)),
                _day(key.created_at),
                _day(key.expires_at),
            )
            for key in keys
        ),
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
        return _there(host, folder, ["revoke", "--", id_of(key_id)])
    key = _store(door).revoke(id_of(key_id))
    click.echo(f"Revoked {key.id} ({key.name}).", err=True)
    return 0


def _given(told: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a policy that were named on the command line."""
    return {name: value for name, value in told.items() if value is not None and value != ()}


def _words(scopes: tuple[str, ...], told: dict[str, Any]) -> list[str]:
    """Return the options again, for the same verb on another machine."""
    words = [f"--scope={scope}" for scope in scopes]
    for name, value in _given(told).items():
        option = "--model" if name == "models" else "--" + name.replace("_", "-")
        words += [f"{option}={item}" for item in (value if name == "models" else [value])]
    return words


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
    import msgspec

    return {
        "id": key.id,
        "name": key.name,
        "state": key.state,
        "scopes": sorted(key.scopes),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        **msgspec.structs.asdict(key.policy),
    }


def id_of(text: str) -> str:
    """Return a key's id; of a whole key, as one that leaked is at hand, the id in it."""
    from rbee.queen.keys import ID_CHARS, PREFIX

    return text.removeprefix(PREFIX)[:ID_CHARS] if text.startswith(PREFIX) else text


def _shown(name: str, value: object) -> str:
    if name in LIMITS:
        return str(value or "no limit")
    if isinstance(value, (list, tuple)):
        return ", ".join(value) or ("every one" if name == "models" else "")
    return str(value)


def _day(moment: float | None) -> str:
    if moment is None:
        return "never"
    return datetime.datetime.fromtimestamp(moment, tz=datetime.UTC).astimezone().strftime("%Y-%m-%d %H:%M")
