"""`rbee worker`: start, stop and look at workers."""

from __future__ import annotations

import click

from rbee.cli.command import Group, Verb, hive_option, json_option
from rbee.cli.door import Door, only_hive
from rbee.cli.naming import complete_models
from rbee.cli.terminal import Waiting, clean
from rbee.client import Client
from rbee.errors import InvalidInput, NotFound
from rbee.wire.fleet import HiveView, WorkerReport

READ_ON = "docs/cli.md#rbee-worker"


@click.group("worker", cls=Group)
def command() -> None:
    """Start, stop and look at workers: one process, one model.

    Workers start by themselves when a model is asked for; these commands are for whoever wants to decide.
    """


@command.command(
    "list", cls=Verb, read_on=READ_ON, examples=[("rbee worker list", "Show every worker of every machine.")]
)
@json_option
@click.pass_obj
def list_(door: Door, as_json: bool) -> None:
    """List the workers of every machine; exit with 3 when no queen runs."""
    with door.client() as client:
        hives = client.get("/v1/hives", list[HiveView])
    if as_json:
        import msgspec

        workers = [{"hive": hive.hive, **msgspec.to_builtins(worker)} for hive in hives for worker in hive.workers]
        click.echo(msgspec.json.format(msgspec.json.encode(workers), indent=2))
        return
    from rbee.cli.fleet_tables import show_workers

    show_workers(hives)


@command.command(
    "spawn",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee worker spawn -m llama-3-8b", "Load a model and wait until it is ready."),
        ("rbee worker spawn -m llama-3-8b -a gaming-pc --ctx 8192 --slots 4", "On one machine, four jobs at once."),
        ("rbee worker spawn -m rbee-demo --backend xllamacpp --name demo", "Choose the engine and the name."),
    ],
)
@click.option(
    "-m",
    "--model",
    metavar="MODEL",
    required=True,
    shell_complete=complete_models,
    help="The model, as `rbee model list` names it.",
)
@hive_option
@click.option(
    "--backend", metavar="ENGINE", default="", help="The engine, as `rbee plugin list` names it; or a device."
)
@click.option("--device", metavar="DEVICE", default="", help="cpu, cuda, metal or rocm (default: cpu).")
@click.option("--gpu", metavar="N[,N]", help="Which GPUs, counted from 0.")
@click.option("--name", metavar="NAME", default="", help="The worker's name (default: made from the model's).")
@click.option(
    "--port", metavar="N", type=click.IntRange(0, 65535), default=0, help="Its port (default: 8001 or the next free)."
)
@click.option("--ctx", metavar="N", type=click.IntRange(0, 16_777_216), default=0, help="The context, in tokens.")
@click.option("--slots", metavar="N", type=click.IntRange(0, 1024), default=0, help="How many jobs at once.")
@click.option(
    "--threads", metavar="N", type=click.IntRange(0, 1024), default=0, help="How many threads of the processor."
)
@click.option(
    "--option", "options", metavar="KEY=VALUE", multiple=True, help="One of the engine's own settings; repeatable."
)
@click.option("--no-wait", is_flag=True, help="Do not wait until the model is loaded.")
@click.pass_obj
def spawn(
    door: Door,
    model: str,
    hive: str | None,
    backend: str,
    device: str,
    gpu: str | None,
    name: str,
    port: int,
    ctx: int,
    slots: int,
    threads: int,
    options: tuple[str, ...],
    no_wait: bool,
) -> None:
    """Start a worker and print its name; the queen is started when none runs."""
    from rbee.cli.spawning import ThroughQueen, request
    from rbee.cli.spawning import spawn as start

    wanted = request(
        model,
        backend=backend,
        device=device,
        gpu=gpu,
        name=name,
        port=port,
        ctx=ctx,
        slots=slots,
        threads=threads,
        options=_pairs(options),
    )
    with Waiting() as waiting:
        address = door.started(waiting.step)
        with door.client(address) as client:
            hive = hive or only_hive(client, waiting.step)
    with door.client(address) as client:
        start(ThroughQueen(client, hive), wanted, wait=not no_wait)


@command.command(
    "stop",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee worker stop rbee-demo", "End its jobs, then the worker."),
        ("rbee worker stop gaming-pc/llama-3-8b", "Name the machine too, where names are the same."),
    ],
)
@click.argument("name", metavar="[HIVE/]NAME")
@click.pass_obj
def stop(door: Door, name: str) -> None:
    """Stop a worker; running jobs may end first."""
    with door.client() as client, Waiting(f"stopping {name}"):
        hive, found = find(client, name)
        client.delete(f"/v1/hives/{hive}/workers/{found.name}", WorkerReport, timeout_s=60.0)
    click.echo(f"Stopped {hive}/{found.name}.", err=True)


@command.command(
    "logs", cls=Verb, read_on=READ_ON, examples=[("rbee worker logs rbee-demo -n 50", "Show its last 50 lines.")]
)
@click.argument("name", metavar="[HIVE/]NAME")
@click.option(
    "-n",
    "--lines",
    metavar="N",
    type=click.IntRange(1, 10_000),
    default=100,
    show_default=True,
    help="How many lines.",
)
@click.pass_obj
def logs(door: Door, name: str, lines: int) -> None:
    """Show what a worker wrote last."""
    with door.client() as client:
        hive, found = find(client, name)
        answer = client.send("GET", f"/v1/hives/{hive}/workers/{found.name}/log?lines={lines}")
        click.echo(clean(answer.read(timeout_s=30.0).decode(errors="replace")), nl=False)


@command.command(
    "run",
    cls=Verb,
    read_on=READ_ON,
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h"]},
    examples=[
        ("rbee worker run --backend echo --port 8001", "Serve with an engine that needs no model."),
        ("rbee worker run --model ./tinyllama.gguf --help", "See every option."),
    ],
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> None:
    """Run one worker in the foreground, without queen and hive."""
    from rbee.cli.programs import become

    become("rbee.worker", ["run", *arguments])


def find(client: Client, name: str) -> tuple[str, WorkerReport]:
    """Return the hive of a worker and its report. Raises: NotFound, InvalidInput when machines share the name."""
    wanted_hive, _, wanted = name.rpartition("/")
    known = [(hive.hive, worker) for hive in client.get("/v1/hives", list[HiveView]) for worker in hive.workers]
    found = [(hive, worker) for hive, worker in known if worker.name == wanted and wanted_hive in ("", hive)]
    if not found:
        names = ", ".join(f"{hive}/{worker.name}" for hive, worker in known) or "none"
        raise NotFound(f"There is no worker {name!r}; running: {names}", hint="rbee worker list")
    if len(found) > 1:
        raise InvalidInput(
            f"Several machines have a worker {name!r}",
            hint=" or ".join(f"{hive}/{worker.name}" for hive, worker in found),
        )
    return found[0]


def _pairs(options: tuple[str, ...]) -> dict[str, str]:
    for option in options:
        if "=" not in option or option.startswith("="):
            raise click.UsageError(f"--option {option!r} is not of the form KEY=VALUE.")
    return dict(option.split("=", 1) for option in options)
