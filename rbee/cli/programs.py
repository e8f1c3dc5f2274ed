"""The other three programs by name: `queen-rbee`, `rbee-hive` and `worker-rbee`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from rbee import __version__
from rbee.cli.command import Group, Verb
from rbee.cli.local_queen import SAFE_PATH
from rbee.cli.main import run
from rbee.errors import PluginProblem

DEVICES = ("cpu", "cuda", "metal", "rocm")
THIS_MACHINES_QUEEN = "http://127.0.0.1:7833"
PASS_ON = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
REST = click.argument("arguments", nargs=-1, type=click.UNPROCESSED)


@click.group("queen-rbee", cls=Group)
@click.version_option(__version__, "-V", "--version", message="rbee %(version)s")
def _queen() -> None:
    """The queen: admits and routes every job, and serves the API on port 7833."""


@_queen.command(
    "daemon",
    cls=Verb,
    context_settings=PASS_ON,
    read_on="docs/cli.md#the-other-programs",
    examples=[("queen-rbee daemon", "Run the queen in the foreground, until SIGTERM or Ctrl+C.")],
)
@REST
def _queen_daemon(arguments: tuple[str, ...]) -> None:
    """Run the queen; the options are those of `rbee queen run`."""
    become("rbee.queen", ["run", *arguments])


@click.group("rbee-hive", cls=Group)
@click.version_option(__version__, "-V", "--version", message="rbee %(version)s")
def _hive() -> None:
    """The hive: runs the models of this machine for a queen, on port 7835."""


@_hive.command(
    "daemon",
    cls=Verb,
    context_settings=PASS_ON,
    read_on="docs/cli.md#the-other-programs",
    examples=[("rbee-hive daemon --queen http://192.168.1.5:7833", "Run the hive and report to a queen.")],
)
@REST
def _hive_daemon(arguments: tuple[str, ...]) -> None:
    """Run the hive; the options are those of `rbee hive run`."""
    become("rbee.hive", ["run", *hive_arguments(arguments)])


@_hive.group("worker", cls=Group)
def _hive_worker() -> None:
    """Start, stop and look at the workers of this machine."""


@_hive_worker.command(
    "spawn",
    cls=Verb,
    read_on="docs/cli.md#the-other-programs",
    examples=[
        ("rbee-hive worker spawn cuda --model llama-7b --gpu 0", "Load a model on the first GPU of this machine.")
    ],
)
@click.argument("device", metavar="DEVICE|ENGINE")
@click.option("-m", "--model", metavar="MODEL", required=True, help="The model, as `rbee model list` names it.")
@click.option("--gpu", metavar="N[,N]", help="Which GPUs, counted from 0.")
@click.option(
    "--port", metavar="N", type=click.IntRange(0, 65535), default=0, help="The worker's port (8001 or the next free)."
)
@click.option("--no-wait", is_flag=True, help="Do not wait until the model is loaded.")
def _hive_worker_spawn(device: str, model: str, gpu: str | None, port: int, no_wait: bool) -> None:
    """Start a worker on this machine's hive, on a device (cpu, cuda, metal, rocm) or by an engine's name."""
    from rbee.cli.spawning import LocalHive, request, spawn

    spawn(LocalHive.running(), request(model, backend=device, gpu=gpu, port=port), wait=not no_wait)


@click.command(
    "worker-rbee",
    cls=Verb,
    context_settings=PASS_ON,
    read_on="docs/cli.md#the-other-programs",
    examples=[
        ("worker-rbee --backend cpu --model tinyllama.gguf", "Serve one file on this machine's processor."),
        ("worker-rbee --backend echo --port 8005", "Serve with an engine by its name."),
    ],
)
@click.version_option(__version__, "-V", "--version", message="rbee %(version)s")
@click.option(
    "--backend",
    metavar="DEVICE|ENGINE",
    default="cpu",
    show_default=True,
    help="A device (cpu, cuda, metal, rocm), or an engine as `rbee plugin list` names it.",
)
@click.option("--model", metavar="FILE", default="", help="A model file, or rbee-demo.")
@REST
def _worker(backend: str, model: str, arguments: tuple[str, ...]) -> None:
    """Serve one model over OpenAI HTTP, in the foreground; further options are those of `rbee worker run`."""
    chosen = ["--device", backend] if backend in DEVICES else []
    engine = engine_for(model) if backend in DEVICES else backend
    become("rbee.worker", ["run", "--backend", engine, *chosen, *(["--model", model] if model else []), *arguments])


def engine_for(model: str) -> str:
    """Return the engine that loads a file by default. Raises: InvalidModelFile, PluginProblem."""
    from rbee.formats import inspect
    from rbee.worker.backends import report_all

    file = Path(model).expanduser()
    kind = inspect(file).format if model and file.is_file() else "gguf"
    able = [engine.name for engine in report_all() if kind in engine.formats and not engine.problem]
    if not able:
        raise PluginProblem(f"No engine that can run here loads {kind} files", hint="rbee plugin list")
    return "xllamacpp" if "xllamacpp" in able else able[0]


def hive_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the options of a hive started by hand: it reports to this machine's queen unless told of another."""
    told = any(argument == "--queen" or argument.startswith("--queen=") for argument in arguments)
    return [*arguments] if told else [*arguments, "--queen", THIS_MACHINES_QUEEN]


def become(module: str, arguments: Sequence[str]) -> None:
    """Replace this process with `python -m module`, so that signals reach it and its exit code is ours."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], {**os.environ, **SAFE_PATH})


def queen() -> int:
    """Run `queen-rbee`."""
    return run(_queen, sys.argv[1:], "queen-rbee")


def hive() -> int:
    """Run `rbee-hive`."""
    return run(_hive, sys.argv[1:], "rbee-hive")


def worker() -> int:
    """Run `worker-rbee`."""
    return run(_worker, sys.argv[1:], "worker-rbee")
