"""`rbee`: the table of its verbs, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from rbee import __version__
from rbee.cli.command import Lazy, LazyGroup
from rbee.errors import RbeeError

SECTIONS = {
    "Run": {
        "infer": Lazy("rbee.cli.infer", "Ask a model and stream its answer."),
    },
    "Apply": {
        "plan": Lazy("rbee.cli.plan", "Show what an apply would add, change and remove."),
        "apply": Lazy("rbee.cli.apply", "Bring every machine of an inventory to what it says."),
        "drift": Lazy("rbee.cli.drift", "Show what was changed on the machines by hand."),
        "rollback": Lazy("rbee.cli.rollback", "Bring machines back to what an earlier apply brought them to."),
        "history": Lazy("rbee.cli.history", "Show what was applied, and what can be gone back to."),
        "status": Lazy("rbee.cli.status", "Show every machine of the inventory, its services and workers."),
        "gitops": Lazy("rbee.cli.gitops", "Keep the machines as a git repository says."),
        "logs": Lazy("rbee.cli.logs", "Show what a machine's services wrote."),
        "ssh": Lazy("rbee.cli.ssh", "Log in to a machine of the inventory, or run a command there."),
        "forget": Lazy("rbee.cli.forget", "Remove everything of rbee from a machine, or from what is known here."),
    },
    "Manage": {
        "queen": Lazy("rbee.cli.queen", "Start, stop and look at the queen, which serves the API."),
        "hive": Lazy("rbee.cli.hive", "Install a hive on a machine, look at the machines, or run a hive on this one."),
        "worker": Lazy("rbee.cli.worker", "Start, stop and look at workers: one process, one model."),
        "job": Lazy("rbee.cli.job", "List jobs, follow one, and cancel it."),
        "model": Lazy("rbee.cli.model", "List, add and remove model files."),
        "inventory": Lazy("rbee.cli.inventory", "Check and show the files that say which machines there are."),
        "hosts": Lazy("rbee.cli.hosts", "List the machines of the inventory, and say whose host keys are trusted."),
        "scheduler": Lazy("rbee.cli.scheduler", "Look at the routing script, try another one out, and share it."),
        "key": Lazy("rbee.cli.key", "Make and revoke API keys."),
    },
    "Look": {
        "top": Lazy("rbee.cli.top", "Watch the queen at work: machines, devices, workers, who waits, tokens a second."),
        "plugin": Lazy("rbee.cli.plugin", "Show the installed engines and what each can do."),
        "proof": Lazy("rbee.cli.proof", "Check a recorded answer by running it again."),
        "doctor": Lazy("rbee.cli.doctor", "Check this machine, and say what to try."),
        "version": Lazy("rbee.cli.version", "Show the versions of rbee and of what it runs on."),
        "completion": Lazy("rbee.cli.completion", "Print the completion script for a shell."),
    },
}
"""Every verb, in the order in which help and docs list them."""


@click.group(
    "rbee",
    cls=LazyGroup,
    sections=SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", message="rbee %(version)s")
@click.option(
    "--queen",
    "url",
    metavar="URL",
    envvar="RBEE_URL",
    help="Use the queen at this address, instead of one on this machine [env: RBEE_URL].",
)
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="RBEE_API_KEY",
    help="The key for that queen; better in the environment than here [env: RBEE_API_KEY].",
)
@click.pass_context
def cli(ctx: click.Context, url: str | None, api_key: str | None) -> None:
    """Turn the machines you own into one OpenAI-compatible AI service.

    Start with:  rbee infer -p "How do I add a machine?"
    """
    from rbee.cli.door import Door

    ctx.obj = Door(url, api_key or "")


def main(args: Sequence[str] | None = None) -> int:
    """Run `rbee` and return its exit code; `args` None takes those of this process."""
    name = Path(sys.argv[0]).name
    name = name if name == "rbee-keeper" else "rbee"
    instruction = os.environ.get(f"_{name.replace('-', '_').upper()}_COMPLETE")
    if instruction:
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, name, f"_{name.replace('-', '_').upper()}_COMPLETE", instruction)
    return run(cli, sys.argv[1:] if args is None else list(args), name)


def run(command: click.Command, args: list[str], name: str) -> int:
    """Run one command; every error ends here."""
    try:
        with command.make_context(name, args) as ctx:
            outcome = command.invoke(ctx)
            sys.stdout.flush()
            return outcome if isinstance(outcome, int) else 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as problem:
        path = problem.ctx.command_path if isinstance(problem, click.UsageError) and problem.ctx else name
        return _fail(problem.format_message(), f"{path} --help", problem.exit_code)
    except RbeeError as problem:
        message, hint = split_hint(problem)
        return _fail(message, hint, exit_code(problem))
    except BrokenPipeError:
        # The reader (| head) has all it wants. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, click.Abort):
        return 130
    except OSError as problem:
        where = f"{problem.filename}: " if problem.filename else ""
        return _fail(f"{where}{problem.strerror or problem}", None, 1)


def split_hint(problem: RbeeError) -> tuple[str, str | None]:
    """Return an error's message and its hint; an error that came over HTTP has both in one line."""
    if problem.hint:
        return problem.message, problem.hint
    message, found, hint = problem.message.rpartition(". Try: ")
    return (message, hint) if found else (hint, None)


def exit_code(problem: RbeeError) -> int:
    """Return what `rbee` ends with; an error that came over HTTP is known by its code, then by its status."""
    if "exit_code" in vars(problem):
        return problem.exit_code
    known = _exit_codes(RbeeError).get(problem.code or "")
    if type(problem).__module__ == RbeeError.__module__ or known is not None:
        return problem.exit_code if known is None else known
    return BY_STATUS.get(problem.status, 2 if 400 <= problem.status < 500 else 1)


BY_STATUS = {401: 5, 403: 5, 404: 4, 429: 6, 502: 3, 503: 6, 504: 3}


def _exit_codes(family: type[RbeeError]) -> dict[str, int]:
    codes = {family.code: family.exit_code} if family.code else {}
    for member in family.__subclasses__():
        codes.update(_exit_codes(member))
    return codes


def _fail(message: str, hint: str | None, code: int) -> int:
    from rbee.cli.terminal import clean

    click.echo(f"rbee: {clean(message)}", err=True)
    if hint:
        click.echo(f"  try: {clean(hint)}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
