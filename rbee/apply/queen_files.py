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
from rbee.wire.settings import QueenSettings, dump_settings, read_settings

ISSUER, JWKS, SETTINGS = "jwt.yaml", "jwks.json", "queen.yaml"
OF_APPLY = ("host", "port", "inventory", "identity", "gitops")
"""Settings that follow from the inventory, or from where things lie on a host."""


def queen_files(fleet: Fleet) -> QueenFiles:
    """Return what the queen of a fleet needs beside its inventory. Raises: SetupProblem for what is wrong in it."""
    issuer, jwks = _issuer(fleet.folder / ISSUER)
    settings, password = _settings(fleet.folder / SETTINGS)
    return QueenFiles(
        settings=settings, state_password=password, issuer=issuer, jwks=jwks, server_keys=_server_keys(fleet)
    )


def queen_extras(fleet: Fleet) -> set[str]:
    """Return the extras of rbee that a queen needs for what lies beside her inventory. Raises: SetupProblem."""
    settings, _ = _settings(fleet.folder / SETTINGS)
    wanted = {"jwt": (fleet.folder / ISSUER).exists(), "redis": settings.state, "otel": settings.otlp_endpoint}
    return {extra for extra, needed in wanted.items() if needed}


def _settings(path: Path) -> tuple[QueenSettings, bytes]:
    """Return the queen's own settings, and the password that they name a file for."""
    if not path.exists():
        return QueenSettings(), b""
    settings = read_settings(path, QueenSettings, hint="docs/apply.md, The queen's own settings")
    usual = QueenSettings()
    ours = [name for name in OF_APPLY if getattr(settings, name) != getattr(usual, name)]
    if ours:
        raise SetupProblem(f"{path}: {', '.join(ours)}: rbee apply sets this", hint="the inventory says it: QueenPort")
    if not settings.state and (settings.processes > 1 or settings.advertise or settings.state_password_file):
        raise SetupProblem(f"{path}: what processes and queens share needs a place", hint="state: redis://HOST:6379/0")
    if not settings.state_password_file:
        return settings, b""
    try:
        return settings, (path.parent / settings.state_password_file).read_bytes()
    except OSError as problem:
        what = f"{path}: state_password_file: {settings.state_password_file} cannot be read ({problem.strerror})"
        raise SetupProblem(what) from None


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
