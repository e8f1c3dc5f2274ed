"""`rbee scheduler`: look at the routing script, try one before it is in force, and share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from rbee.cli.command import Group, Verb, json_option
from rbee.cli.door import Door
from rbee.cli.needs import need
from rbee.cli.scheduler_share import install, publish
from rbee.cli.scheduler_try import replay, simulate
from rbee.cli.terminal import clean, table
from rbee.errors import InvalidScript
from rbee.wire.openai import PriorityWord
from rbee.wire.scheduler import ExplainJob, Explanation, SchedulerView

READ_ON = "docs/routing.md"
API = "/v1/orchestrator/scheduler"


@click.group("scheduler", cls=Group)
def command() -> None:
    """Look at the routing script, try another one out, and share it."""


@command.command(
    "check",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee scheduler check scheduler.rhai", "Compile it, and call it with jobs and workers made up for it.")],
)
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Compile a script and call its functions; exit with 2 when it has a mistake."""
    need("rhai", "queen")
    from rbee.queen.script import read_script
    from rbee.queen.trial import trials

    compiled = read_script(file)
    found = list(dict.fromkeys(trials(compiled)))
    if found:
        raise InvalidScript("\n".join(found))
    click.echo(f"{file} is sound: {', '.join(sorted(compiled.functions))}")


@command.command("show", cls=Verb, read_on=READ_ON, examples=[("rbee scheduler show", "Print the script in force.")])
@json_option
@click.pass_obj
def show(door: Door, as_json: bool) -> None:
    """Print the script in force, and what is wrong with yours if anything is."""
    with door.client() as client:
        view = client.get(API, SchedulerView)
    if as_json:
        _json(view)
        return
    _state(view)
    click.echo(clean(view.text), nl=False)


@command.command(
    "reload", cls=Verb, read_on=READ_ON, examples=[("rbee scheduler reload", "Read the script again at once.")]
)
@click.pass_obj
def reload(door: Door) -> int:
    """Have the queen read the script again at once; it is read within a second of a save anyway."""
    with door.client() as client:
        view = client.post(f"{API}/reload", None, SchedulerView)
    _state(view)
    return 2 if view.error else 0


@command.command(
    "explain",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee scheduler explain --model llama-3-70b", "Say which worker a chat with this model goes to, and why."),
        ("rbee scheduler explain -m sdxl --capability image --priority batch", "The same for another kind of job."),
    ],
)
@click.option("-m", "--model", required=True, help="The job's model.")
@click.option("--capability", default="chat", show_default=True, help="What it asks for: chat, embedding, image …")
@click.option(
    "--priority",
    type=click.Choice(get_args(PriorityWord)),
    default="interactive",
    show_default=True,
    help="What its client says.",
)
@click.option("--tier", default="", help="The key's customer tier.")
@click.option("--tenant", default="", help="The key's tenant.")
@click.option("--region", default="", help="The region that it must stay in.")
@click.option("-a", "--hive", default="", help="The machine that the client asks for.")
@click.option("--tag", "tags", multiple=True, help="A word of the client's own; may be given several times.")
@click.option("--prompt-tokens", type=click.IntRange(0, 2**31), default=0, help="The size of its prompt.")
@click.option("--max-tokens", type=click.IntRange(0, 2**31), default=0, help="The longest answer that it wants.")
@click.option("--stream", is_flag=True, help="It wants an event stream.")
@json_option
@click.pass_obj
def explain(door: Door, /, as_json: bool, tier: str, tags: tuple[str, ...], **job: Any) -> None:
    """Ask the running queen which worker a job would go to, why, and which line decided; nothing is run."""
    with door.client() as client:
        told = client.post(f"{API}/explain", ExplainJob(customer_tier=tier, tags=list(tags), **job), Explanation)
    if as_json:
        _json(told)
        return
    _explain(told)


command.add_command(simulate)
command.add_command(replay)
command.add_command(install)
command.add_command(publish)


def _state(view: SchedulerView) -> None:
    mode = ", which only the operator's API replaces" if view.platform else ""
    click.echo(f"In force: {clean(view.source)}{mode}", err=True)
    if view.error:
        click.echo(f"  {clean(view.error)}", err=True)
    elif view.source != view.path and not view.platform:
        click.echo(f"  yours would be {clean(view.path)}", err=True)


def _explain(told: Explanation) -> None:
    goes = ", else ".join(told.chosen) or "nowhere yet: it waits until the fleet changes"
    click.echo(f"Goes to:     {clean(goes)}")
    click.echo(f"Decided by:  {clean(told.by)}, line {told.line} in {told.function}")
    click.echo(f"             {clean(told.code)}")
    if told.problem:
        click.echo(f"Your script: {clean(told.problem)}")
    click.echo()
    order = {worker: str(place) for place, worker in enumerate(told.chosen, 1)}
    columns = ("choice", "worker", "backend", "gpu", "busy", "loaded", "region", "tokens/s")
    rows = [
        (
            order.get(worker["id"], ""),
            worker["id"],
            worker["backend"],
            worker["gpu_type"],
            f"{worker['in_flight']}/{worker['slots']}",
            "yes" if worker["loaded"] else "no",
            worker["region"],
            f"{worker['tokens_per_second']:.0f}",
        )
        for worker in told.workers
    ]
    table(columns, sorted(rows, key=lambda row: (not row[0], row[0])))
    for worker, why in told.refused.items():
        click.echo(f"Not shown to the script: {clean(worker)}, because {clean(why)}")


def _json(value: object) -> None:
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))
