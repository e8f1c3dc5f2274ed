"""What every command of `rbee` has: examples, a place to read on, and an answer to a misspelt word."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

EXIT_CODES = {
    0: "done",
    1: "something failed",
    2: "bad input or usage",
    3: "not running, not reachable, or lost on the way",
    4: "no such model or name",
    5: "a key is missing or wrong",
    6: "busy: try again later",
    130: "interrupted with Ctrl+C",
}
"""What `rbee` ends with; `rbee.errors` says which error has which code."""

Examples = Sequence[tuple[str, str]]


class Verb(click.Command):
    """A command with examples: pairs of a command line and what it does."""

    def __init__(self, *args: Any, examples: Examples, read_on: str = "docs/cli.md", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.read_on = read_on

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, self.examples)
        formatter.write_paragraph()
        formatter.write_text(f"Read on: {self.read_on}")


class Group(click.Group):
    """A command that has commands; alone it shows its help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help())
            ctx.exit(0)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, name) is None:
            raise click.UsageError(self._unknown(ctx, name), ctx=ctx)
        return super().resolve_command(ctx, args)

    def _unknown(self, ctx: click.Context, name: str) -> str:
        near = difflib.get_close_matches(name, self.list_commands(ctx), n=2, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr(word) for word in near)}?" if near else ""
        return f"{ctx.command_path!r} has no command {name!r}.{hint}"


@dataclass(frozen=True)
class Lazy:
    """Where a command lives, and its line in the list of commands."""

    module: str
    summary: str


class LazyGroup(Group):
    """A group whose commands are imported when they are used, listed in sections."""

    def __init__(self, *args: Any, sections: Mapping[str, Mapping[str, Lazy]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections
        self._verbs = {name: lazy for verbs in sections.values() for name, lazy in verbs.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        lazy = self._verbs.get(cmd_name)
        if lazy is None:
            return None
        command: click.Command = importlib.import_module(lazy.module).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, verbs in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([(name, lazy.summary) for name, lazy in verbs.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])
        formatter.write_paragraph()
        formatter.write_text("Read on: rbee COMMAND --help, and docs/cli.md")


def write_examples(formatter: click.HelpFormatter, examples: Examples) -> None:
    """Write the section "Examples"; a command line is never wrapped."""
    formatter.write_paragraph()
    formatter.write_heading("Examples")
    formatter.indent()
    for line, meaning in examples:
        formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
        formatter.indent()
        formatter.write_text(meaning)
        formatter.dedent()
    formatter.dedent()


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
hive_option = click.option(
    "-a", "--hive", "--node", metavar="HIVE", help="The machine to use, by its hive's name (default: rbee chooses)."
)
