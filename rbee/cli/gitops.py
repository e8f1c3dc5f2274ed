"""`rbee gitops`: keep the fleet as a git repository says."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rbee.cli.command import Group, Verb, json_option
from rbee.errors import InvalidInput, NotFound
from rbee.wire.gitops import GitopsState

if TYPE_CHECKING:
    from rbee.apply.gitops.options import Options
    from rbee.apply.gitops.records import Records
    from rbee.wire.gitops import GitopsHost, GitopsStatus

F = TypeVar("F", bound=Callable[..., object])
READ_ON = "docs/gitops.md"
CONVERGED, FAILED, PENDING, NOT_RUNNING = 0, 1, 2, 3
CODES = {
    GitopsState.CONVERGED: CONVERGED,
    GitopsState.FAILED: FAILED,
    GitopsState.APPLYING: PENDING,
    GitopsState.SUSPENDED: PENDING,
}
SERVICE_FOLDER = Path("/var/lib/rbee/gitops")
COLOURS = {"converged": "green", "failed": "red", "applying": "yellow", "suspended": "yellow"}
SHORT = 12

folder_option = click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="The reconciler's own folder (default: the service's on this machine, else one in your state folder).",
)  # fmt: skip


@click.group("gitops", cls=Group)
def command() -> None:
    """Keep the machines as a git repository says.

    Every commit of a branch is applied, and what is changed by hand is put back.
    """


@command.command(
    "run",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee gitops run --repo git@example.org:fleet.git --identity inventory/.rbee", "Follow the branch main."),
        ("rbee gitops run --repo fleet.git --identity .rbee --once", "Do what is due at present, and end."),
    ],
)
@click.option("--repo", metavar="URL", help="The repository: an address that git knows, or a folder.")
@click.option("--branch", metavar="NAME", default="main", show_default=True, help="The branch to follow.")
@click.option("--path", "path", metavar="DIR", default="inventory", show_default=True, help="The inventory in it.")
@click.option("--interval", metavar="S", type=click.FloatRange(1, 86400), default=60.0, show_default=True,
              help="Look at the branch so often.")  # fmt: skip
@click.option("--drift-interval", metavar="S", type=click.FloatRange(1, 86400), default=600.0, show_default=True,
              help="Compare the machines so often.")  # fmt: skip
@click.option("--no-heal", is_flag=True, help="Tell what was changed by hand, but leave it so.")
@click.option("--require-signed", is_flag=True, help="Apply only commits with a trusted signature.")
@click.option("--allowed-signers", type=click.Path(path_type=Path), metavar="FILE",
              help="Who may sign, by SSH key (default: allowed_signers in the folder).")  # fmt: skip
@click.option("--identity", type=click.Path(path_type=Path), metavar="DIR",
              help="The fleet's secrets (default: identity in the folder).")  # fmt: skip
@click.option("--ssh-key", type=click.Path(path_type=Path), metavar="FILE", help="A private key for hosts and git.")
@click.option("--once", is_flag=True, help="End when nothing is due at present.")
@click.option("--settings", type=click.Path(path_type=Path), metavar="FILE", help="Read all of these from a file.")
@folder_option
def run(settings: Path | None, folder: Path | None, once: bool, **given: Any) -> int:
    """Follow a branch, until Ctrl+C.

    Exit codes with --once: 0 every host is as the branch says, 1 something failed, 2 something is still to come.
    """
    from rbee.apply.gitops.reconciler import Reconciler

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options = _declared(settings) if settings else _asked(folder or default_folder(), **given)
    reconciler = Reconciler(options)

    def stop(number: int, frame: object) -> None:
        reconciler.stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    state = reconciler.run(once=once, ready=_tell_systemd)
    return CODES[state] if once else 0


@command.command(
    "status",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee gitops status", "Show which commit every host has."), ("rbee gitops status --json", "As JSON.")],
)
@json_option
@folder_option
def status(folder: Path | None, as_json: bool) -> int:
    """Show how far the reconciler is.

    Exit codes: 0 every host is as the branch says, 1 something failed, 2 something is still to come or it is
    suspended, 3 no reconciler runs.
    """
    import msgspec

    records = _records(folder)
    told, running = _status(records), records.is_held()
    if as_json:
        click.echo(json.dumps({"running": running, **msgspec.to_builtins(told)}, indent=2))
    else:
        _show(told, running=running)
    return CODES[told.state] if running else NOT_RUNNING


@command.command(
    "suspend",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee gitops suspend --reason 'new racks'", "Change nothing until `rbee gitops resume`.")],
)
@click.option("--reason", default="", metavar="TEXT", help="Why; `status` shows it.")
@folder_option
def suspend(folder: Path | None, reason: str) -> None:
    """Have the reconciler change nothing. What it is doing at present ends first."""
    _records(folder).suspend(reason)
    click.echo("Suspended. Go on with: rbee gitops resume", err=True)


@command.command(
    "resume", cls=Verb, read_on=READ_ON, examples=[("rbee gitops resume", "Go on after `rbee gitops suspend`.")]
)
@folder_option
def resume(folder: Path | None) -> None:
    """Let a suspended reconciler go on."""
    if not _records(folder).resume():
        click.echo("It was not suspended.", err=True)


@command.command(
    "sync", cls=Verb, read_on=READ_ON, examples=[("rbee gitops sync", "Look at the branch and the machines at once.")]
)
@folder_option
def sync(folder: Path | None) -> int:
    """Have the reconciler look at once, and try again what failed."""
    records = _records(folder)
    records.ask_sync()
    return _told(records, "it will look when it starts")


@command.command(
    "accept",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee gitops accept 3f9c2ab", "Follow a branch that was rewritten, from this commit on.")],
)
@click.argument("revision", metavar="REV")
@folder_option
def accept(folder: Path | None, revision: str) -> int:
    """Follow a branch whose history was rewritten; REV is a commit that it contains."""
    if not 7 <= len(revision) <= 64 or set(revision.lower()) - set("0123456789abcdef"):
        raise InvalidInput(f"{revision!r} is no commit hash", hint="rbee gitops status names it")
    records = _records(folder)
    records.ask_accept(revision.lower())
    return _told(records, "it will accept the commit when it starts")


@command.command(
    "history",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee gitops history -n 20", "Show the last 20 things that were done, and for whose commit.")],
)
@click.option("-n", "--lines", metavar="N", type=click.IntRange(0, 100_000), default=50, show_default=True,
              help="How many.")  # fmt: skip
@json_option
@folder_option
def history(folder: Path | None, lines: int, as_json: bool) -> None:
    """Show what was done, when, and for whose commit."""
    entries = _records(folder).history(lines)
    if as_json:
        click.echo(json.dumps(entries, indent=2))
        return
    for entry in entries:
        _show_entry(entry)


def default_folder() -> Path:
    """Return the folder of the service on this machine, else the person's own."""
    from rbee.paths import state_dir

    own = state_dir() / "gitops"
    return SERVICE_FOLDER if SERVICE_FOLDER.is_dir() and not own.is_dir() else own


def _records(folder: Path | None) -> Records:
    from rbee.apply.gitops.records import Records

    return Records(folder or default_folder())


def _told(records: Records, otherwise: str) -> int:
    """Return the exit code of what a reconciler was asked for; one that does not run finds it later."""
    if records.is_held():
        return 0
    click.echo(f"No reconciler runs; {otherwise}.", err=True)
    return NOT_RUNNING


def _status(records: Records) -> GitopsStatus:
    told = records.status()
    if told is None:
        raise NotFound(f"No reconciler has worked in {records.folder} yet", hint="rbee gitops run, or --folder DIR")
    return told


def _asked(
    folder: Path, *, repo: str | None, branch: str, path: str, interval: float, drift_interval: float, no_heal: bool,
    require_signed: bool, allowed_signers: Path | None, identity: Path | None, ssh_key: Path | None,
) -> Options:  # fmt: skip
    from rbee.apply.gitops.options import Options

    if not repo:
        raise InvalidInput("Which repository?", hint="--repo URL")
    inside = Path(path)
    if inside.is_absolute() or ".." in inside.parts:
        raise InvalidInput(f"--path {path} leaves the repository", hint="a folder in it, such as inventory")
    return Options(
        repository=str(Path(repo).absolute()) if Path(repo).exists() else repo,
        branch=branch,
        path=str(inside),
        folder=folder.absolute(),
        identity=(identity or folder / "identity").absolute(),
        interval_s=interval,
        drift_interval_s=drift_interval,
        heal=not no_heal,
        require_signed=require_signed,
        signers=allowed_signers.absolute() if allowed_signers else None,
        ssh_key=ssh_key.absolute() if ssh_key else None,
    )


def _declared(path: Path) -> Options:
    """Return what `rbee apply` wrote for the service."""
    from rbee.apply.gitops.options import Options
    from rbee.wire.settings import GitopsSettings, read_settings, secret_path

    told = read_settings(path, GitopsSettings)
    return Options(
        repository=told.repository,
        branch=told.branch,
        path=told.path,
        folder=Path(told.folder),
        identity=secret_path(told.identity),
        interval_s=told.interval_s,
        drift_interval_s=told.drift_interval_s,
        heal=told.heal,
        require_signed=told.require_signed,
        signers=Path(told.allowed_signers) if told.allowed_signers else None,
        ssh_key=secret_path(told.ssh_key) if told.ssh_key else None,
        known_hosts=Path(told.known_hosts) if told.known_hosts else None,
    )


def _tell_systemd() -> None:
    from rbee.notify import Notifier

    Notifier.from_environment().send("READY=1")


def _show(told: GitopsStatus, *, running: bool) -> None:
    from rbee.cli.terminal import age, clean, table

    word = click.style(told.state, fg=COLOURS[told.state], bold=True)
    looked = f"looked {age(time.time() - told.checked_at)} ago" if told.checked_at else "has not looked yet"
    where = f"at {told.revision[:SHORT]}" if told.revision else "no commit is on every host yet"
    wanted = f", wants {told.wanted[:SHORT]}" if told.wanted not in ("", told.revision) else ""
    click.echo(f"{word}: {where}{wanted}; {looked}")
    if not running:
        click.secho("No reconciler runs; this is what the last one told.", fg="red")
    for line in told.error.splitlines():
        click.echo(f"  {clean(line)}")
    table(["host", "state", "commit", "attempts", "problem"], [_row(n, host) for n, host in told.hosts.items()])


def _row(name: str, host: GitopsHost) -> list[str]:
    return [name, host.state, host.revision[:SHORT], str(host.attempts or ""), host.error.partition("\n")[0]]


def _show_entry(entry: dict[str, Any]) -> None:
    from rbee.cli.terminal import clean

    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.get("at", 0)))
    revision, author = str(entry.get("revision", ""))[:SHORT], entry.get("author", "")
    signed = f", signed by {entry['signer']}" if entry.get("signer") else ""
    line = f"{at}  {revision}  {entry.get('action', '')}: {entry.get('result', '')} ({author}{signed})"
    click.echo(clean(line))
    for text in str(entry.get("error", "")).splitlines():
        click.echo(f"    {clean(text)}")
