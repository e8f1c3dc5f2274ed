"""Tokens that programs of one person share through a file."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from rbee.errors import SetupProblem


def shared_token(path: Path) -> str:
    """Return the token in `path`, made with mode 0600 by whoever comes first. Raises: SetupProblem."""
    try:
        if not path.exists():
            _make(path)
        token = path.read_text().strip()
    except OSError as problem:
        raise SetupProblem(f"Cannot read or make the token file {path} ({problem.strerror})") from None
    if len(token) < 16:
        raise SetupProblem(f"The token file {path} is damaged", hint=f"rm {path}")
    return token


def _make(path: Path) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32))
        # Unlike a rename, a link leaves the token that another program was first to make.
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)
