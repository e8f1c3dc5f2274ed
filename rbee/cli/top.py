"""`rbee top`: what is going on at this moment, drawn again about once a second."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, replace

import click
import msgspec

from rbee.cli.command import Verb
from rbee.cli.door import Door
from rbee.cli.terminal import clean, write
from rbee.cli.top_view import frame
from rbee.errors import Busy, Lost, RbeeError
from rbee.wire.load import QueenLoad

READ_ON = "docs/cli.md#rbee-top"
PATH = "/v1/orchestrator/load"
ANSWER_TIMEOUT_S = 5.0
GONE = (Lost, Busy)
"""What passes: the queen is away, or has no time to answer."""


@click.command(
    "top",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee top", "Watch machines, workers and queues; q or Ctrl+C leaves."),
        ("rbee top --once", "Print how things are, and end."),
        ("rbee top --json --follow | jq .tokens_per_second", "Use a figure in a script, one each second."),
    ],
)
@click.option(
    "--interval",
    "interval_s",
    metavar="S",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Look every so many seconds.",
)
@click.option("--once", is_flag=True, help="Print it once, as lines, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and end; with --follow one each time.")
@click.option("--follow", is_flag=True, help="With --json: go on until Ctrl+C.")
@click.pass_obj
def command(door: Door, interval_s: float, once: bool, as_json: bool, follow: bool) -> None:
    """Watch the queen at work: machines, devices, workers, who waits, tokens a second.

    Rates are those of the last five seconds. Where the output is no terminal, it prints lines each time. It goes on
    when the queen is away, and shows her again when she is back; it exits with 3 when none runs at its start.
    """
    if follow and (once or not as_json):
        raise click.UsageError("--follow goes with --json, and not with --once")
    first = read(door)
    if as_json and not follow:
        click.echo(msgspec.json.format(msgspec.json.encode(first), indent=2))
    elif once:
        write(frame(first, None))
    elif as_json or not sys.stdout.isatty():
        _print(door, first, interval_s, as_json=as_json)
    else:
        from rbee.cli.top_screen import watch

        watch(Reader(door, interval_s, Reading(first)))


@dataclass(frozen=True)
class Reading:
    """The last that was heard of the queen; `problem` says why it is not of this moment."""

    load: QueenLoad
    problem: str = ""
    away_since: float = 0.0


def read(door: Door) -> QueenLoad:
    """Ask the queen. Raises: RbeeError."""
    with door.client() as client:
        return client.get(PATH, QueenLoad, timeout_s=ANSWER_TIMEOUT_S)


def next_reading(door: Door, last: Reading) -> Reading:
    """Return what is heard now; of a queen that is away, the last, with why. Raises: RbeeError that will not pass."""
    try:
        return Reading(read(door))
    except GONE as problem:
        return replace(last, problem=problem.message, away_since=last.away_since or time.time())


class Reader:
    """Asks the queen in a thread of its own, so that keys are heard while she does not answer."""

    def __init__(self, door: Door, interval_s: float, first: Reading) -> None:
        self.last = first
        self.failure: RbeeError | None = None
        self.renewed = threading.Event()
        self._door = door
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                self.last = next_reading(self._door, self.last)
            except RbeeError as problem:
                self.failure = problem
                self.renewed.set()
                return
            self.renewed.set()


def _print(door: Door, first: QueenLoad, interval_s: float, *, as_json: bool) -> None:
    """Print a frame each time, until the reader of the output or the person has enough."""
    reading = Reading(first)
    while True:
        if not reading.problem:
            if as_json:
                click.echo(msgspec.json.encode(reading.load))
            else:
                write(frame(reading.load, None))
                click.echo()
            sys.stdout.flush()
        time.sleep(interval_s)
        before, reading = reading, next_reading(door, reading)
        if reading.problem and not before.problem:
            click.echo(f"The queen is away: {clean(reading.problem)}", err=True)
        elif before.problem and not reading.problem:
            click.echo("The queen is back.", err=True)
