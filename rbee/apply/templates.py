"""Renders `templates/`: Jinja2, each named as the file that lands on the host."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rbee
from rbee.errors import SetupProblem

if TYPE_CHECKING:
    from jinja2 import Environment


def render(name: str, /, **variables: Any) -> str:
    """Return the text of `templates/NAME.j2`. Raises: SetupProblem when the template is not there."""
    return _environment().get_template(f"{name}.j2").render(**variables)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(shipped("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def shipped(name: str) -> Path:
    """Return a folder that comes with rbee: in a checkout beside the package, in an installed rbee inside of it."""
    package = Path(rbee.__file__).parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise SetupProblem(f"This rbee came without its {name} folder", hint="install rbee again")


def shipped_text(name: str) -> str:
    """Return the text of a program of this package that runs on hosts."""
    return Path(__file__).with_name(name).read_text()
