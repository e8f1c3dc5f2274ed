"""`rbee scheduler simulate` and `replay`: a script on jobs that are made up, or that were."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from rbee.cli.command import Verb, json_option
from rbee.cli.door import Door
from rbee.cli.needs import need
from rbee.cli.terminal import clean, table
from rbee.client import Client
from rbee.errors import InvalidInput, NotFound
from rbee.wire.scheduler import ExplainJob, Explanation

if TYPE_CHECKING:
    from rbee.queen.simulation import Outcome, Replayed, TriedJob

READ_ON = "docs/routing.md"
API = "/v1/orchestrator/scheduler"
UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
EXAMPLES = 10
MAX_LINES = 1_000_000


class SimulatedJob(ExplainJob, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of a file of jobs: what it asks for, when it comes and how long it holds a slot, in seconds."""

    at_s: float = 0.0
    duration_s: float = 0.0


@click.command(
    "simulate",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee scheduler simulate new.rhai --jobs jobs.jsonl", "Count where made-up jobs would go."),
        ("rbee scheduler simulate new.rhai --jobs jobs.jsonl --workers fleet.json", "The same without a queen."),
    ],
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--jobs", "jobs_file", required=True, type=click.Path(path_type=Path), help="Jobs, one JSON object a line."
)
@click.option(
    "--workers",
    "workers_file",
    type=click.Path(path_type=Path),
    help="A file that `explain --json` wrote (default: the running queen's workers).",
)
@json_option
@click.pass_obj
def simulate(door: Door, file: Path, jobs_file: Path, workers_file: Path | None, as_json: bool) -> None:
    """Say where jobs would go, one after another; each holds a slot of its worker for its `duration_s`."""
    need("rhai", "queen")
    from rbee.queen import simulation
    from rbee.queen.script import read_script

    script = read_script(file)
    jobs = list(read_jobs(jobs_file))
    models = {str(job.task["model"]): str(job.task["capability"]) for job in jobs}
    if workers_file is not None:
        known = read_workers(workers_file)
        workers = dict.fromkeys(models, known)
    else:
        with door.client() as client:
            workers = {model: _workers(client, model, kind) for model, kind in models.items()}
    outcome = simulation.simulate(script, jobs, workers)
    if as_json:
        _json({"jobs": outcome.jobs, "chosen": outcome.chosen, "busiest": outcome.busiest, **_problems(outcome)})
        return
    table(
        ("worker", "jobs", "share", "most at a time"),
        (
            (name, count, f"{count / outcome.jobs:.0%}", outcome.busiest[name] or "")
            for name, count in outcome.chosen.most_common()
        ),
    )
    _tell(outcome)


@click.command(
    "replay",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee scheduler replay new.rhai --since 24h", "Decide yesterday's jobs anew, beside what was decided.")],
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--since", default="24h", show_default=True, help="How far back: 90s, 30m, 24h, 7d.")
@click.option(
    "--decisions", type=click.Path(path_type=Path), help="A copy of a queen's decisions.jsonl, instead of a queen."
)
@json_option
@click.pass_obj
def replay(door: Door, file: Path, since: str, decisions: Path | None, as_json: bool) -> None:
    """Decide the jobs of late anew with another script, and show both decisions; nothing is run."""
    need("rhai", "queen")
    from rbee.queen import simulation
    from rbee.queen.script import read_script

    script, since_s = read_script(file), seconds(since)
    outcome = simulation.Outcome()
    with _lines(door, decisions, since_s) as lines:
        replayed = list(simulation.replay(script, lines, time.time() - since_s, outcome))
    if not replayed:
        raise NotFound(f"No decision of the last {since} is known", hint="a longer --since")
    then = Counter(one.then for one in replayed)
    moved = [one for one in replayed if one.then != one.now]
    if as_json:
        examples = [_example(one) for one in moved[:EXAMPLES]]
        _json({"jobs": outcome.jobs, "then": then, "now": outcome.chosen, "moved": len(moved), "examples": examples,
               **_problems(outcome)})  # fmt: skip
        return
    names = sorted({*then, *outcome.chosen}, key=lambda name: -then[name])
    table(("worker", "then", f"with {file.name}"), ((name, then[name], outcome.chosen[name]) for name in names))
    click.echo(f"{len(moved)} of {outcome.jobs} jobs would go elsewhere.")
    for one in moved[:EXAMPLES]:
        click.echo(clean("  {at}  {model}  {priority}: {then} → {now}".format(**_example(one))))
    _tell(outcome)


def read_jobs(path: Path) -> Iterator[TriedJob]:
    """Yield the jobs of a file. Raises: InvalidInput with the line."""
    from rbee.queen.simulation import TriedJob
    from rbee.queen.trial import capability_of, described

    decoder = msgspec.json.Decoder(SimulatedJob)
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if number > MAX_LINES:
                raise InvalidInput(f"{path} has more than {MAX_LINES} lines")
            try:
                wanted = decoder.decode(line)
            except msgspec.DecodeError as problem:
                raise InvalidInput(f"{path}:{number}: {problem}", hint='{"model": "llama-3-8b"}') from None
            capability = capability_of(wanted.capability)
            if capability is None:
                raise InvalidInput(f"{path}:{number}: {wanted.capability!r} is no capability")
            yield TriedJob(wanted.at_s, wanted.duration_s, described(wanted, capability))


def read_workers(path: Path) -> list[dict[str, Any]]:
    """Read the workers of an `explain --json`, or a list of them. Raises: InvalidInput."""
    from rbee.queen.trial import place

    with _opened(path) as file:
        try:
            told = msgspec.json.decode(file.read())
            listed = told["workers"] if isinstance(told, dict) else told
            found = [{**place(0), **msgspec.convert(worker, dict[str, Any])} for worker in listed]
        except (msgspec.DecodeError, KeyError, TypeError) as problem:
            raise InvalidInput(f"{path} holds no list of workers ({problem})", hint="explain --json") from None
    unknown = {key for worker in found for key in worker.keys() - place(0).keys()}
    if unknown:
        raise InvalidInput(f"{path}: workers have no {', '.join(sorted(unknown))}", hint=", ".join(place(0)))
    return found


def seconds(text: str) -> float:
    """Read a length of time such as 24h. Raises: InvalidInput."""
    number, unit = text[:-1], text[-1:]
    if not number.isdecimal() or len(number) > 6 or unit not in UNITS_S:
        raise InvalidInput(f"{text!r} is no length of time", hint="90s, 30m, 24h or 7d")
    return int(number) * UNITS_S[unit]


def _lines(door: Door, path: Path | None, since_s: float) -> Any:
    """Open the decisions, of a file or of the running queen."""
    import contextlib

    @contextlib.contextmanager
    def opened() -> Iterator[Iterator[Mapping[str, Any]]]:
        if path is not None:
            with _opened(path) as file:
                yield _decoded(file)
            return
        with door.client() as client:
            yield _decoded(_split(client, since_s))

    return opened()


def _split(client: Client, since_s: float) -> Iterator[bytes]:
    """Yield the lines that the queen sends."""
    answer = client.send("GET", f"{API}/decisions?since_s={since_s:g}", timeout_s=60.0)
    rest = b""
    try:
        while data := answer.next(60.0):
            *lines, rest = (rest + data).split(b"\n")
            yield from lines
    finally:
        answer.close()
    yield rest


def _decoded(lines: Iterable[bytes]) -> Iterator[Mapping[str, Any]]:
    """Yield what can be read; the last line of a file that was cut off cannot."""
    decoder = msgspec.json.Decoder(dict[str, Any])
    for line in lines:
        try:
            found = decoder.decode(line)
        except msgspec.DecodeError:
            continue
        if {"at", "places"} <= found.keys():
            yield found


def _workers(client: Client, model: str, capability: str) -> list[dict[str, Any]]:
    wanted = ExplainJob(model=model, capability=capability)
    workers = client.post(f"{API}/explain", wanted, Explanation).workers
    return [{**worker, "in_flight": 0, "queue": 0, "load": 0.0} for worker in workers]


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as problem:
        raise InvalidInput(f"{path} cannot be read ({problem.strerror})") from None


def _example(one: Replayed) -> dict[str, str]:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.at))
    names = {name: str(one.task.get(name, "")) for name in ("model", "priority")}
    return {"at": at, **names, "then": one.then, "now": one.now}


def _problems(outcome: Outcome) -> dict[str, Any]:
    return {"problems": dict(outcome.problems), "p50_us": _p50(outcome)}


def _p50(outcome: Outcome) -> float:
    return round(statistics.median(outcome.times_us), 1) if outcome.times_us else 0.0


def _tell(outcome: Outcome) -> None:
    for problem, count in outcome.problems.most_common(5):
        click.echo(clean(f"{count} times the built-in script decided, because {problem}"))
    click.echo(f"A decision took {_p50(outcome):.0f} µs (median).")


def _json(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))
