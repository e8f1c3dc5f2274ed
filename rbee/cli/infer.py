"""`rbee infer`: ask a model and stream its answer."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import click

from rbee.cli.chat import Question, Reply, ask
from rbee.cli.command import Verb, hive_option
from rbee.cli.door import Address, Door
from rbee.cli.naming import complete_models, progress_of
from rbee.cli.terminal import Waiting, clean
from rbee.errors import InvalidRequest, PayloadTooLarge, Unreachable
from rbee.paths import BUILT_IN_MODEL

if TYPE_CHECKING:
    from rbee.cli.bundle import Recorder

MAX_SEED = 2**63 - 1
MAX_PROMPT_BYTES = 4 * 1024 * 1024


def _seed(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    if value is not None and not -MAX_SEED <= value <= MAX_SEED:
        raise click.BadParameter(f"{value} does not fit in 64 bits.", ctx, param)
    return value


@click.command(
    "infer",
    cls=Verb,
    examples=[
        ('rbee infer -p "How do I add a machine?"', "Ask the built-in demo model; the queen starts by itself."),
        ("rbee infer -m llama-3-8b --system 'Answer in French.' < question.txt", "Ask another model, from a file."),
        ('rbee infer -a gaming-pc -m llama-3-8b -p "Hello" --json', "Use one machine; print one JSON object."),
        ('rbee infer --ephemeral --temperature 0 -p "Hello"', "Start everything for this one answer and end it after."),
    ],
    read_on="docs/cli.md#rbee-infer",
)
@click.option(
    "-m",
    "--model",
    metavar="MODEL",
    envvar="RBEE_MODEL",
    default=BUILT_IN_MODEL,
    shell_complete=complete_models,
    show_default=True,
    help="The model, as `rbee model list` names it [env: RBEE_MODEL].",
)
@click.option("-p", "--prompt", metavar="TEXT", help="What to ask; without it, standard input is read.")
@hive_option
@click.option("--system", metavar="TEXT", help="Instructions that stand before the prompt.")
@click.option("--max-tokens", metavar="N", type=click.IntRange(1, 2**31 - 1), help="End the answer after N tokens.")
@click.option("--temperature", metavar="T", type=click.FloatRange(0, 2), help="0 (always the same) to 2 (wild).")
@click.option("--seed", metavar="N", type=int, callback=_seed, help="Make chance repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when the answer is whole.")
@click.option("--ephemeral", is_flag=True, help="Start a queen, hive and worker for this answer only; leave nothing.")
@click.option("-q", "--quiet", is_flag=True, help="No spinner, and no line of figures at the end.")
@click.pass_obj
def command(
    door: Door,
    model: str,
    prompt: str | None,
    hive: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    as_json: bool,
    ephemeral: bool,
    quiet: bool,
) -> None:
    """Ask a model and stream its answer.

    The answer goes to standard output, everything else to standard error, so that pipes work. The queen is started
    when none runs and stays for the next call. A model that is not loaded is loaded first. Ctrl+C cancels the job.

    With LLORCH_RUN_ID=NAME in the environment the run is recorded in .proof_bundle/integration/NAME/
    (see `rbee proof verify`); the temperature is then 0 and the seed 42, unless given.
    """
    question = Question(model, _prompt(prompt), system, max_tokens, temperature, seed, hive)
    recorder = _recorder()
    if recorder is not None:
        question = recorder.fix(question)
    with (
        ended_by_signals(),
        Waiting("starting", quiet=quiet) as waiting,
        queen(door, question, ephemeral, waiting) as address,
    ):
        try:
            reply = stream(address, question, waiting, recorder=recorder, show=not as_json)
        except Unreachable:
            # The queen may have ended between the look at its record and the question; nothing was sent.
            address = door.started_again(address, waiting.step)
            reply = stream(address, question, waiting, recorder=recorder, show=not as_json)
        if recorder is not None:
            waiting.step("recording the run")
            folder = recorder.write(address, question, reply)
    if as_json:
        _print_json(question, reply)
    if not quiet:
        _print_figures(reply)
        if recorder is not None:
            click.echo(f"recorded in {folder}", err=True)


def stream(
    address: Address, question: Question, waiting: Waiting, *, recorder: Recorder | None = None, show: bool
) -> Reply:
    """Ask, and print the answer as it comes when `show`; an answer that is left early is cancelled."""
    waiting.step(f"loading {question.model}", progress_of(address, question.model))
    reply = ask(address.url, address.token, question, recorder.note if recorder else None)
    out = sys.stdout
    safe = clean if out.isatty() else str
    try:
        for text in reply.texts():
            waiting.step(f"{question.model} is thinking")
            if text and show:
                waiting.stop()
                out.write(safe(text))
                out.flush()
        waiting.stop()
        if show and not reply.text.endswith("\n"):
            out.write("\n")
            out.flush()
    finally:
        reply.close()
    return reply


@contextlib.contextmanager
def queen(door: Door, question: Question, ephemeral: bool, waiting: Waiting) -> Iterator[Address]:
    """Yield the queen to ask: one for this job only, or the one that runs or is started."""
    if ephemeral:
        if door.url:
            raise click.UsageError("--ephemeral starts a queen of its own; it cannot be used with --queen or RBEE_URL.")
        from rbee.cli.ephemeral import ephemeral_queen

        with ephemeral_queen(question.model, waiting.step) as address:
            yield address
        return
    yield door.started(waiting.step)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl+C does, so that a job is cancelled and nothing is left."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prompt(given: str | None) -> str:
    """Return the prompt. Raises: UsageError when there is none, PayloadTooLarge, InvalidRequest."""
    if given is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError('There is no prompt. Give one with -p "…", or through a pipe: echo "…" | rbee infer')
        data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        if len(data) > MAX_PROMPT_BYTES:
            raise PayloadTooLarge(MAX_PROMPT_BYTES)
        try:
            given = data.decode().removesuffix("\n")
        except UnicodeDecodeError as problem:
            raise InvalidRequest(f"Standard input is no text in UTF-8 (byte {problem.start})") from None
    if not given.strip():
        raise click.UsageError('The prompt is empty. Give one with -p "…", or through a pipe: echo "…" | rbee infer')
    return given


def _recorder() -> Recorder | None:
    run_id = os.environ.get("LLORCH_RUN_ID")
    if not run_id:
        return None
    from rbee.cli.bundle import Recorder

    return Recorder(run_id)


def _print_json(question: Question, reply: Reply) -> None:
    import msgspec

    usage = msgspec.to_builtins(reply.usage) if reply.usage else None
    timings = {
        "time_to_first_token_s": reply.first_token_s,
        "total_s": reply.total_s,
        "tokens_per_second": reply.tokens_per_second(),
    }
    whole = {"text": reply.text, "model": question.model, "finish_reason": reply.finish_reason, "usage": usage}
    if reply.reasoning:
        whole["reasoning"] = reply.reasoning
    whole |= {"timings": timings, "job": reply.job, "worker": reply.worker}
    click.echo(msgspec.json.format(msgspec.json.encode(whole), indent=2))


def _print_figures(reply: Reply) -> None:
    parts = []
    if reply.usage:
        parts.append(f"{reply.usage.completion_tokens} tokens")
    speed = reply.tokens_per_second()
    if speed is not None:
        parts.append(f"{speed:.1f} tokens/s")
    if reply.first_token_s is not None:
        first = f"{reply.first_token_s:.1f} s" if reply.first_token_s >= 1 else f"{reply.first_token_s * 1000:.0f} ms"
        parts.append(f"first token after {first}")
    if reply.finish_reason == "length":
        parts.append("cut at --max-tokens or the end of the context")
    click.echo(" · ".join(parts), err=True)


__all__ = ["Unreachable", "command"]
