"""Help teaches, and what it says is true."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from rbee.cli import docs, programs
from rbee.cli.command import LazyGroup, Verb
from rbee.cli.main import cli, exit_code, split_hint
from rbee.errors import RbeeError, UnknownModel, WorkerLost
from rbee.wire.errors import decode_error, encode_error

REPOSITORY = Path(__file__).parents[2]


def commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from commands(inner, (*path, name))


ALL = [
    *commands(cli, ("rbee",)),
    *commands(programs._queen, ("queen-rbee",)),
    *commands(programs._hive, ("rbee-hive",)),
    *commands(programs._worker, ("worker-rbee",)),
]
VERBS = [(path, command) for path, command in ALL if not isinstance(command, click.Group)]


def named(found: list[tuple[tuple[str, ...], click.Command]]) -> list[object]:
    return [pytest.param(path, command, id=" ".join(path)) for path, command in found]


@pytest.mark.parametrize(("path", "command"), named(ALL))
def test_every_command_says_in_one_line_what_it_does(path: tuple[str, ...], command: click.Command) -> None:
    first = (command.help or "").strip().split("\n\n")[0]
    assert first
    assert len(command.get_short_help_str(limit=1000)) <= 100


@pytest.mark.parametrize(("path", "command"), named(VERBS))
def test_every_example_is_a_command_line_that_is_taken(
    path: tuple[str, ...], command: click.Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert isinstance(command, Verb)
    assert command.examples
    for line, _ in command.examples:
        words = shlex.split(re.split(r" [<>|] ", re.sub(r"^export \w+=\$\((.*)\)$", r"\1", line))[0])
        assert tuple(words[: len(path)]) == path, line
        arguments = words[len(path) :]
        if "--help" not in arguments:
            command.make_context(" ".join(path), arguments)


@pytest.mark.parametrize(("path", "command"), named(VERBS))
def test_help_shows_the_examples_and_where_to_read_on(path: tuple[str, ...], command: click.Command) -> None:
    assert isinstance(command, Verb)
    shown = command.get_help(click.Context(command, info_name=" ".join(path)))
    for line, _ in command.examples:
        assert line in shown
    assert re.search(r"Read on: docs/[a-z]+\.md(#[a-z-]+)?$", " ".join(shown.split()))


def test_the_list_of_commands_says_what_the_commands_say() -> None:
    assert isinstance(cli, LazyGroup)
    context = click.Context(cli)
    for verbs in cli.sections.values():
        for name, lazy in verbs.items():
            command = cli.get_command(context, name)
            assert command is not None
            full = (command.help or "").strip()
            same = lazy.summary.removesuffix(".") in " ".join(full.split())
            assert same, f"{name}: {lazy.summary!r} is not in {full!r}"


def test_the_documentation_is_what_the_commands_are() -> None:
    written = (REPOSITORY / "docs" / "cli.md").read_text("utf-8")
    assert written == docs.render(), "out of date: python -m rbee.cli.docs > docs/cli.md"


def test_every_place_to_read_on_exists() -> None:
    wanted = {command.read_on for _, command in VERBS if isinstance(command, Verb)}
    wanted |= {f"docs/cli.md#{anchor}" for anchor in re.findall(r"\]\(#([^)]*)\)", docs.render())}
    assert wanted <= set(places())


def places() -> Iterator[str]:
    """Yield every page of the documentation and every heading in it, as links name them."""
    for path in (REPOSITORY / "docs").glob("*.md"):
        page = docs.render() if path.name == "cli.md" else path.read_text("utf-8")
        yield f"docs/{path.name}"
        for title in re.findall(r"^#+ (.*)$", page, re.M):
            anchor = re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
            yield f"docs/{path.name}#{anchor}"


def test_a_warm_infer_imports_nothing_heavy() -> None:
    heavy = (
        "rich",
        "tinydb",
        "gevent",
        "falcon",
        "gunicorn",
        "rhai",
        "jinja2",
        "rbee.wire.openai",
        "rbee.queen",
        "subprocess.run",
    )
    code = f"import sys, rbee.cli.main, rbee.cli.infer; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_error_of_the_queen_ends_with_the_code_of_its_family() -> None:
    for error in (UnknownModel("x"), WorkerLost("the worker died"), *(kind("x") for kind in plain(RbeeError))):
        over_http = decode_error(error.status, encode_error(error))
        assert exit_code(over_http) == error.exit_code, type(error)


def plain(family: type[RbeeError]) -> Iterator[type[RbeeError]]:
    if family.__init__ is RbeeError.__init__:
        yield family
    for member in family.__subclasses__():
        if member.__module__ == RbeeError.__module__:
            yield from plain(member)


def test_an_engines_own_error_is_judged_by_its_status() -> None:
    for status, code in ((400, 2), (401, 5), (404, 4), (422, 2), (429, 6), (500, 1), (502, 3), (503, 6), (504, 3)):
        assert exit_code(decode_error(status, b'{"detail": "no"}')) == code


def test_a_hint_that_came_over_http_is_shown_as_one() -> None:
    error = decode_error(404, encode_error(UnknownModel("llama")))
    message, hint = split_hint(error)
    assert hint == "rbee model add FILE"
    assert "Try:" not in message
