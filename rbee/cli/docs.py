"""Writes docs/cli.md from the commands themselves: `python -m rbee.cli.docs > docs/cli.md`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from rbee.cli import programs
from rbee.cli.command import EXIT_CODES, LazyGroup, Verb
from rbee.cli.main import cli

INTRODUCTION = """\
# The command line

Every command has `--help`, with examples. Answers go to standard output; progress, figures and errors go to standard
error, so that pipes work. What lists or shows something takes `--json`. Tables have colours on a terminal only, and
not there when `NO_COLOR` is set.

An error is one line, `rbee: what is wrong`, and where it is known, a second one: `  try: what to do`.

This page is made from the commands: `python -m rbee.cli.docs > docs/cli.md`.
"""

ENVIRONMENT = {
    "RBEE_URL": "Use the queen at this address, as `--queen` does.",
    "RBEE_API_KEY": "The key for that queen, as `--api-key` does.",
    "RBEE_MODEL": "The model that `rbee infer` asks when `-m` is not given.",
    "RBEE_QUEEN_PORT, RBEE_HIVE_PORT": "The ports of a queen that starts by itself and of her hive; 0: any free one.",
    "RBEE_HOME": "One folder for configuration, state and cache, in place of the XDG folders.",
    "RBEE_SCRIPTS": "A folder or an https address with scripts for [rbee scheduler install](#rbee-scheduler).",
    "LLORCH_RUN_ID": "Record the run in `.proof_bundle/integration/RUN_ID/`; see [rbee proof](#rbee-proof).",
    "NO_COLOR": "No colours (no-color.org).",
}

EPHEMERAL = """\
## One job and nothing left: `--ephemeral`

`rbee infer --ephemeral` starts a queen, hive and worker of its own in a temporary folder, on free ports, and ends them
with the answer: also after Ctrl+C, when `rbee` is killed (the kernel then ends the queen, who ends the rest), and when
the queen is killed (`rbee` then ends the rest). Models on your own list can be asked; the routing script is the
built-in one, so that the run does not depend on what else is configured.
"""

PROOF = """\
## Proof bundles

`LLORCH_RUN_ID=test-001 rbee infer -p "hello"` leaves, in the current folder,

| file | what it holds |
|---|---|
| `.proof_bundle/integration/test-001/seeds.json` | seed and temperature: 42 and 0 unless given |
| `…/transcript.ndjson` | every server-sent event, with its time since the question in seconds |
| `…/metadata.json` | model with its file's SHA-256, engine with its version, device, rbee's version, prompt, job id |
| `…/result.txt` | the answer, byte for byte |

The folder appears when the answer is whole; a second run of the same id replaces it. `rbee proof verify DIR` asks again
and compares: it ends with 0 when the answer is the same, with 1 and a short difference when it is not, with 2 when the
folder is no bundle.
"""


def render() -> str:
    """Return the whole page."""
    return "\n".join(_page()).rstrip() + "\n"


def _page() -> Iterator[str]:
    yield INTRODUCTION
    yield "## Exit codes\n\n| code | meaning |\n|---|---|"
    yield from (f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    yield "\n`rbee doctor` ends with 1 when a check fails; `rbee proof verify` is told of below."
    yield "`rbee plan`, `drift`, `apply`, `rollback` and `status` say more by theirs: [apply](apply.md#exit-codes)."
    yield "A reader that stops early (`rbee infer … | head -1`) is no error.\n"
    yield "## Environment\n\n| variable | what it does |\n|---|---|"
    yield from (f"| `{name.replace(', ', '`, `')}` | {meaning} |" for name, meaning in ENVIRONMENT.items())
    yield f"\n{EPHEMERAL}\n{PROOF}\n## Commands\n"
    assert isinstance(cli, LazyGroup)
    for title, verbs in cli.sections.items():
        yield f"**{title}:** " + ", ".join(f"[{name}](#rbee-{name})" for name in verbs) + "\n"
    root = click.Context(cli, info_name="rbee")
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        yield from _command(command, f"rbee {name}", 3)
    yield "## The other programs\n"
    for command in (programs._queen, programs._hive, programs._worker):
        yield from _command(command, command.name or "", 3)


def _command(command: click.Command, path: str, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=path)
    yield f"{'#' * level} {path}\n"
    yield f"{_paragraphs(command.help or '')}\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _command(inner, f"{path} {name}", level + 1)
        return
    assert isinstance(command, Verb), f"{path} has no examples"
    yield "```\n" + " ".join([path, *command.collect_usage_pieces(context)]) + "\n```\n"
    records = [parameter.get_help_record(context) for parameter in command.params]
    options = [record for record in records if record and record[1]]
    if options:
        yield "| option | what it does |\n|---|---|"
        yield from (f"| `{name}` | {_cell(meaning)} |" for name, meaning in options)
        yield ""
    for line, meaning in command.examples:
        yield f"- `{line}`\n  {meaning}"
    yield ""


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    click.echo(render(), nl=False)
