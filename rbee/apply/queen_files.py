"""Read what lies beside the inventory on this machine and belongs on the queen's host."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from rbee.apply.desired import SERVER_KEYS, QueenFiles
from rbee.apply.identity import IDENTITY_VARIABLE
from rbee.errors import SetupProblem
from rbee.inventory.fleet import Fleet
from rbee.wire.jwt_settings import EXPLAINED, JwtSettings
from rbee.wire.settings import dump_settings, read_settings

ISSUER, JWKS = "jwt.yaml", "jwks.json"


def queen_files(fleet: Fleet) -> QueenFiles:
    """Return what the queen of a fleet needs beside its inventory. Raises: SetupProblem for a wrong `jwt.yaml`."""
    issuer, jwks = _issuer(fleet.folder / ISSUER)
    return QueenFiles(issuer=issuer, jwks=jwks, server_keys=_server_keys(fleet))


def _issuer(path: Path) -> tuple[bytes, bytes]:
    """Return `jwt.yaml` as the queen's host should have it, and the issuer's keys where a file holds them."""
    if not path.exists():
        return b"", b""
    # What is wrong with it must be said here: a queen that cannot read it does not start.
    settings = read_settings(path, JwtSettings, hint=EXPLAINED)
    if settings.jwks.startswith("http://"):
        raise SetupProblem(f"{path}: jwks must be a file or an https URL: whoever changes it on its way signs tokens")
    if settings.jwks.startswith("https://"):
        return path.read_bytes(), b""
    try:
        jwks = (path.parent / settings.jwks).read_bytes()
    except OSError as problem:
        raise SetupProblem(f"{path}: jwks: {settings.jwks} cannot be read ({problem.strerror})") from None
    if settings.jwks == JWKS:
        return path.read_bytes(), jwks
    return dump_settings(msgspec.structs.replace(settings, jwks=JWKS)).encode(), jwks


def _server_keys(fleet: Fleet) -> dict[str, bytes]:
    """Return the keys of servers that this machine has; those that it lacks lie on the queen's host."""
    found = {}
    for host in fleet.hosts:
        for line in host.workers:
            places = [Path(line.key_file)] if line.key_file else []
            if places and IDENTITY_VARIABLE in os.environ:
                # A reconciler on the queen's host: no key is in its checkout, but an earlier apply brought it.
                places.append(Path(SERVER_KEYS) / f"{host.name}.{line.name}")
            for place in reversed(places):
                with contextlib.suppress(OSError):
                    found[line.key_file] = place.read_bytes()
    return found
