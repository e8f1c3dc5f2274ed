"""`rbee proof`: check a recorded answer by running it again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from rbee.cli.bundle import Metadata, Recorder, read
from rbee.cli.command import Group, Verb
from rbee.cli.door import Door
from rbee.cli.terminal import Waiting, clean

READ_ON = "docs/cli.md#rbee-proof"
BEFORE, AFTER = 30, 50
"""How many characters of each text are shown around the place where they part."""


@click.group("proof", cls=Group)
def command() -> None:
    """Check a recorded answer by running it again.

    LLORCH_RUN_ID=NAME rbee infer … records a run in .proof_bundle/integration/NAME/.
    """


@command.command(
    "verify",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee proof verify .proof_bundle/integration/test-001", "Ask again and compare: 0 same, 1 different."),
        ("rbee proof verify --ephemeral .proof_bundle/integration/test-001", "The same with a queen of its own."),
    ],
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--ephemeral", is_flag=True, help="Start a queen, hive and worker for this answer only; leave nothing.")
@click.pass_obj
def verify(door: Door, folder: Path, ephemeral: bool) -> int:
    """Ask again what a bundle records, and compare: 0 same, 1 different, 2 no bundle."""
    from rbee.cli.infer import ended_by_signals, queen, stream

    question, recorded, expected = read(folder)
    with ended_by_signals(), Waiting("starting") as waiting, queen(door, question, ephemeral, waiting) as address:
        recorder = Recorder(recorded.run_id)
        reply = stream(address, question, waiting, recorder=recorder, show=False)
        today = recorder.metadata(address, question, reply)
    if reply.text == expected:
        click.echo(f"same: {len(expected.encode())} bytes, as recorded")
        return 0
    for line in _difference(expected, reply.text):
        click.echo(clean(line))
    for line in _changes(recorded, today):
        click.echo(f"  {clean(line)}", err=True)
    return 1


def _difference(expected: str, found: str) -> Iterator[str]:
    """Yield where two texts part, and what each says there."""
    pairs = enumerate(zip(expected, found, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
    line = expected.count("\n", 0, at) + 1
    yield f"different from character {at + 1} (line {line}) on:"
    begin = max(0, at - BEFORE)
    for name, text in (("recorded", expected), ("found", found)):
        excerpt = text[begin : at + AFTER].replace("\n", "\\n")
        yield f"  {name + ':':<10}{'…' if begin else ''}{excerpt}{'…' if len(text) > at + AFTER else ''}"


def _changes(recorded: Metadata, today: Metadata) -> Iterator[str]:
    """Yield what is not as it was, and so may be the reason."""
    pairs = {
        "rbee": (recorded.rbee, today.rbee),
        "engine": (f"{recorded.engine.name} {recorded.engine.version}", f"{today.engine.name} {today.engine.version}"),
        "device": (recorded.engine.device, today.engine.device),
        "model file": (recorded.model.sha256[:16], today.model.sha256[:16]),
        "slots": (recorded.engine.slots, today.engine.slots),
    }
    for name, (before, after) in pairs.items():
        if before != after:
            yield f"{name}: recorded with {before}, found with {after}"
