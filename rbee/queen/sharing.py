"""What a queen of several server processes, or one of several queens, is told; checked before anything starts."""

from __future__ import annotations

import stat
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict
from urllib.parse import urlsplit

from rbee.errors import InvalidInput, SetupProblem

MAX_PROCESSES = 64
SCHEMES = ("redis", "rediss", "unix")
STATE_HINT = "--state redis://127.0.0.1:6379/0, with a Redis or Valkey that listens there"


class SharingOptions(TypedDict):
    """The settings of one queen that concern others."""

    processes: int
    state: str
    state_password: str
    advertise: str


def sharing_of(processes: int, state: str, password_file: Path | None, advertise: str) -> SharingOptions:
    """Return what was asked for. Raises: InvalidInput, SetupProblem."""
    if not 1 <= processes <= MAX_PROCESSES:
        raise InvalidInput(f"--processes must be between 1 and {MAX_PROCESSES}")
    if processes > 1 and not state:
        raise InvalidInput(f"{processes} server processes need a place for what they share", hint=STATE_HINT)
    if state:
        _check_state(state)
    elif advertise or password_file:
        raise InvalidInput("An address for other queens, or a password, needs a state to share", hint=STATE_HINT)
    if advertise:
        _check_url(advertise)
    secret = read_password(password_file) if password_file else ""
    return SharingOptions(processes=processes, state=state, state_password=secret, advertise=advertise.rstrip("/"))


def read_password(path: Path) -> str:
    """Return the password that a private file holds. Raises: SetupProblem."""
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise SetupProblem(f"Others may read the password in {path}", hint=f"chmod 600 {path}")
        secret = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise SetupProblem(f"Cannot read the password file {path} ({problem})") from None
    if not secret:
        raise SetupProblem(f"The password file {path} is empty")
    return secret


def _check_state(state: str) -> None:
    parts = urlsplit(state)
    if parts.scheme not in SCHEMES or not (parts.path if parts.scheme == "unix" else parts.hostname):
        raise InvalidInput(f"--state {state!r} is not the address of a Redis", hint=STATE_HINT)
    if parts.password:
        # Everybody on the machine can read a command line.
        raise InvalidInput(
            "A password does not belong into the address of the state", hint="--state-password-file FILE"
        )
    if find_spec("redis") is None:
        raise SetupProblem("Sharing state needs the Python package redis", hint="pip install 'rbee[redis]'")


def _check_url(advertise: str) -> None:
    parts = urlsplit(advertise)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.password:
        raise InvalidInput(f"--advertise {advertise!r} is not an address", hint="http://HOST:PORT")
