"""`rbee queen`: start, stop and look at the queen."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from rbee.cli import local_queen
from rbee.cli.command import Group, Verb, json_option
from rbee.cli.door import Door
from rbee.cli.fleet_tables import show_hives, show_models, show_problems, show_workers
from rbee.cli.local_queen import Options
from rbee.cli.terminal import Waiting, age, clean, console
from rbee.errors import NotFound
from rbee.wire.fleet import QueenStatus

F = TypeVar("F", bound=Callable[..., object])
PORT = click.IntRange(0, 65535)
READ_ON = "docs/cli.md#rbee-queen"


def options(command: F) -> F:
    """Give a command the options that the queen itself takes."""
    for option in (
        click.option("--otlp-endpoint", metavar="URL", help="Send a trace of each job to this collector (OTLP/HTTP)."),
        click.option("--log-jobs", is_flag=True, help="Log a record for each job at its end."),
        click.option("--log-format", type=click.Choice(["text", "json"]), help="How a record of the log looks (text)."),
        click.option("--advertise", metavar="URL", help="This queen's address for other queens of the same state."),
        click.option(
            "--state-password-file",
            metavar="FILE",
            type=click.Path(exists=True, dir_okay=False),
            help="A private file with the password of that Redis.",
        ),
        click.option(
            "--state", metavar="URL", help="The Redis for what processes and queens share: redis://HOST:PORT/0."
        ),
        click.option(
            "--processes", metavar="N", type=click.IntRange(1, 64), help="Server processes (1; more need --state)."
        ),
        click.option(
            "--hive-port", metavar="N", type=PORT, envvar="RBEE_HIVE_PORT", help="The local hive's port (7835)."
        ),
        click.option(
            "--inventory", metavar="DIR", type=click.Path(exists=True, file_okay=False), help="Read machines from DIR."
        ),
        click.option("--host", metavar="H", help="Listen on this address (127.0.0.1; others need keys)."),
        click.option(
            "--port",
            metavar="N",
            type=PORT,
            envvar="RBEE_QUEEN_PORT",
            help="Listen on this port (7833; 0: any free one).",
        ),
    ):
        command = option(command)
    return command


@click.group("queen", cls=Group)
def command() -> None:
    """Start, stop and look at the queen, which serves the API.

    There is one queen for each person and machine. `rbee infer` starts it when it is needed; it stays until it is
    stopped.
    """


@command.command(
    "start",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee queen start", "Start in the background and print the API's address."),
        ("rbee queen start --host 0.0.0.0", "Serve other machines too; they need a key: rbee key create NAME."),
    ],
)
@options
def start(inventory: str | None, state_password_file: str | None, **more: Any) -> None:
    """Start the queen in the background and print its address, once it and this machine's hive are up."""
    # The queen runs in a folder of her own.
    asked = Options(inventory=_absolute(inventory), state_password_file=_absolute(state_password_file), **more)
    with Waiting("starting the queen") as waiting:
        record, started = local_queen.start(asked, waiting.step)
        reported = local_queen.await_hive(record, waiting.step)
    if not started:
        click.echo(f"The queen runs already (process {record.pid}).", err=True)
    if not reported:
        click.echo("This machine's hive has not reported yet; why is in: rbee queen logs", err=True)
    click.echo(f"{local_queen.url_of(record)}/v1")


@command.command("stop", cls=Verb, read_on=READ_ON, examples=[("rbee queen stop", "End running jobs, then the queen.")])
def stop() -> None:
    """Stop the queen, its hive and its workers; running jobs may end first."""
    with local_queen.starting_or_stopping() as record:
        if record is None:
            click.echo("No queen is running.", err=True)
            return
        with Waiting("stopping the queen") as waiting:
            local_queen.stop(record, waiting.step)
    click.echo(f"Stopped the queen (process {record.pid}).", err=True)


@command.command(
    "status",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee queen status", "Show machines, workers, models and problems."),
        ("rbee queen status --json | jq .in_flight", "Use one figure in a script."),
    ],
)
@json_option
@click.pass_obj
def status(door: Door, as_json: bool) -> None:
    """Show the queen, its machines, workers, models and problems; exit with 3 when none runs."""
    with door.client() as client:
        answer = client.send("GET", "/v1/orchestrator/status")
        body = answer.read(timeout_s=10.0)
    import msgspec

    if as_json:
        click.echo(msgspec.json.format(body, indent=2))
        return
    _show(msgspec.json.decode(body, type=QueenStatus))


@command.command(
    "run",
    cls=Verb,
    read_on=READ_ON,
    context_settings={"ignore_unknown_options": True},
    examples=[("rbee queen run --port 7900", "Run in the foreground, until Ctrl+C.")],
)
@options
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def run(more: tuple[str, ...], **given: Any) -> None:
    """Run the queen in the foreground; what else is given goes to `python -m rbee.queen run`."""
    from rbee.cli.programs import become

    become("rbee.queen", ["run", *Options(**given).arguments(), *more])


@command.command(
    "logs",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee queen logs -n 50", "Show the last 50 lines."), ("rbee queen logs -f", "Go on as lines come.")],
)
@click.option(
    "-n",
    "--lines",
    metavar="N",
    type=click.IntRange(0, 1_000_000),
    default=100,
    show_default=True,
    help="How many lines.",
)
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come, until Ctrl+C.")
def logs(lines: int, follow: bool) -> None:
    """Show the log of a queen that was started in the background."""
    path = local_queen.log_path()
    if not path.exists():
        raise NotFound(f"There is no log yet at {path}", hint="rbee queen start; a queen in the foreground logs there")
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in deque(file, maxlen=lines):
            click.echo(clean(line), nl=False)
        while follow:
            line = file.readline()
            if line:
                click.echo(clean(line), nl=False)
                continue
            time.sleep(0.2)
            if path.exists() and path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                # The log was rotated: the rest is in the new file.
                file.close()
                file = path.open(encoding="utf-8", errors="replace")


def _show_sharing(status: QueenStatus, now: float) -> None:
    shared = status.shared_state
    if shared is None:
        return
    state = "reached" if shared.reached else "away"
    others = "".join(f", {name} at {url or 'no address'}" for name, url in sorted(shared.queens.items()))
    click.echo(f"State: {clean(shared.url)} {state} for {age(now - shared.since)}; queen {shared.queen}{clean(others)}")
    for one in status.processes:
        alone = "" if one.state_reached else ", without the state"
        click.echo(
            f"Process {one.slot}: {one.pid}, up {age(now - one.started_at)}, {one.in_flight} in flight, "
            f"{one.waiting} waiting{alone}"
        )


def _absolute(path: str | None) -> str | None:
    return str(Path(path).absolute()) if path else None


def _show(status: QueenStatus) -> None:
    now = time.time()
    draining = ", draining" if status.draining else ""
    click.echo(
        f"Queen {status.version} at {status.url}, process {status.pid}, up {age(now - status.started_at)}, "
        f"{status.in_flight} in flight{draining}"
    )
    _show_sharing(status, now)
    click.echo(f"Script: {status.scheduler or 'built-in'}")
    if status.scheduler_error:
        console().print(f"  {clean(status.scheduler_error)}", style="red")
    show_problems(status.problems)
    click.echo()
    show_hives(status.hives)
    if any(hive.workers for hive in status.hives):
        click.echo()
        show_workers(status.hives)
    click.echo()
    show_models(status.hives)
