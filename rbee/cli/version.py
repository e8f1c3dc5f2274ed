"""`rbee version`: what is installed, and what runs."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import click

from rbee import __version__
from rbee.cli import local_queen
from rbee.cli.command import Verb, json_option

PARTS = ("rhai-py", "gunicorn", "gevent", "falcon", "msgspec", "httptools", "click")


@click.command(
    "version",
    cls=Verb,
    read_on="docs/cli.md#rbee-version",
    examples=[("rbee version", "Show what to write in a bug report.")],
)
@json_option
def command(as_json: bool) -> None:
    """Show the versions of rbee and of what it runs on."""
    record = local_queen.find()
    versions = {
        "rbee": __version__,
        "queen": record.version if record else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **{part: _installed(part) for part in PARTS},
        **{f"plugin {name}": version for name, version in sorted(_plugins().items())},
    }
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(versions | {"executable": sys.executable}), indent=2))
        return
    for name, version in versions.items():
        click.echo(f"{name:<28} {version or ('not running' if name == 'queen' else 'not installed')}")


def _installed(part: str) -> str | None:
    try:
        return metadata.version(part)
    except metadata.PackageNotFoundError:
        return None


def _plugins() -> dict[str, str]:
    """Return the plugins by name with their package's version; none is loaded for that."""
    found = metadata.entry_points(group="rbee.backends")
    return {entry.name: entry.dist.version if entry.dist else "?" for entry in found}
