"""Tokens that programs of one person share through a file."""

from __future__ import annotations

import base64
import contextlib
import hmac
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


def read_token(path: Path, *, whose: str = "", hint: str = "") -> str:
    """Return the token in a file: one line of printable ASCII, which is all that a header can carry.

    `whose` and `hint` go into the message when there is none. Raises: SetupProblem.
    """
    file = f"The token file {path}" + (f" of {whose}" if whose else "")
    try:
        token = path.read_text("ascii").strip()
    except OSError as problem:
        raise SetupProblem(f"{file} cannot be read ({problem.strerror})", hint=hint) from None
    except UnicodeDecodeError:
        token = ""
    if not token or not token.isprintable():
        raise SetupProblem(f"{file} holds no token", hint="one line of printable ASCII")
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


def derived_token(secret: str, *purpose: str) -> str:
    """Return the token for one purpose: HMAC-SHA256 (RFC 2104) of its parts under the fleet's secret.

    Whoever holds the fleet's secret computes the same token, so none has to be stored or sent about.
    Hives: `derived_token(secret, "hive", HOST)`; workers: `derived_token(secret, "worker", HOST, NAME)`.
    """
    digest = hmac.digest(secret.encode(), "\0".join(purpose).encode(), "sha256")
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
