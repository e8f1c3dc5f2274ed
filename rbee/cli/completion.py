"""`rbee completion`: the completion script for a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from rbee.cli.command import Verb
from rbee.errors import NotSupported

WHERE = {
    "bash": "~/.local/share/bash-completion/completions/rbee",
    "zsh": "a folder of $fpath, as _rbee",
    "fish": "~/.config/fish/completions/rbee.fish",
}


@click.command(
    "completion",
    cls=Verb,
    read_on="docs/cli.md#rbee-completion",
    examples=[
        ("rbee completion bash > ~/.local/share/bash-completion/completions/rbee", "Install it for bash."),
        ("rbee completion zsh > ~/.zfunc/_rbee", "Install it for zsh, where ~/.zfunc is in fpath."),
        ("rbee completion fish > ~/.config/fish/completions/rbee.fish", "Install it for fish."),
    ],
)
@click.argument("shell", type=click.Choice(sorted(WHERE)))
def command(shell: str) -> None:
    """Print the completion script for a shell: verbs, options, and the models of the running queen."""
    from rbee.cli.main import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise NotSupported(f"There is no completion for {shell}", hint=" or ".join(sorted(WHERE)))
    click.echo(kind(cli, {}, "rbee", "_RBEE_COMPLETE").source())
