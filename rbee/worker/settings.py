"""From a command line or a spec file to one checked `WorkerSpec`."""

from __future__ import annotations

import argparse
import errno
import os
import re
import secrets
import socket
from pathlib import Path

import msgspec

from rbee import paths
from rbee.errors import InvalidInput, NotFound, PortInUse, SetupProblem
from rbee.tokens import read_token
from rbee.wire.fleet import WorkerSpec

FIRST_PORT = 8001
PORTS_TRIED = 64
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def read_spec(file: Path) -> WorkerSpec:
    """Read the spec that a hive wrote. Raises: SetupProblem."""
    try:
        spec = msgspec.json.decode(file.read_bytes(), type=WorkerSpec)
    except OSError as problem:
        raise SetupProblem(f"Cannot read the worker spec {file} ({problem.strerror})") from None
    except msgspec.DecodeError as problem:
        raise SetupProblem(f"{file} is no worker spec: {problem}") from None
    if not spec.token:
        raise SetupProblem(f"The worker spec {file} has no token")
    return spec


def from_arguments(given: argparse.Namespace) -> WorkerSpec:
    """Build a spec from the command line. Raises: InvalidInput, NotFound, SetupProblem."""
    path, name = _model(given.model)
    host = "127.0.0.1" if given.host == "localhost" else given.host
    return WorkerSpec(
        name=_safe(given.name or name or given.backend),
        backend=given.backend,
        model=given.name or name or given.backend,
        path=path,
        host=host,
        port=given.port if "port" in given else _first_free(host),
        token=_token(given.token_file, host),
        device=given.device,
        gpus=_gpus(given.gpu),
        context_tokens=given.ctx,
        slots=given.slots,
        threads=given.threads,
        options=_options(given.option),
    )


def _model(value: str) -> tuple[str, str]:
    """Return the path and the name of a model: a file, or the built-in one."""
    if not value:
        return "", ""
    file = Path(value).expanduser()
    if file.is_file():
        return str(file.absolute()), re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)
    if value == paths.BUILT_IN_MODEL:
        return str(paths.BUILT_IN_FILE), paths.BUILT_IN_MODEL
    hint = f"the path of a model file, or {paths.BUILT_IN_MODEL}"
    raise NotFound(f"There is no model file {value}", hint=hint)


def _first_free(host: str) -> int:
    """Return the first port from 8001 on that nobody listens on."""
    for port in range(FIRST_PORT, FIRST_PORT + PORTS_TRIED):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as problem:
                if problem.errno == errno.EADDRINUSE:
                    continue
                raise SetupProblem(f"Cannot listen on {host} ({problem.strerror})", hint="another --host") from None
            return port
    raise PortInUse(host, FIRST_PORT)


def _token(file: Path | None, host: str) -> str:
    if file is not None:
        return read_token(file)
    if host in LOOPBACK:
        return ""
    token = f"rbee_worker_{secrets.token_urlsafe(32)}"
    print(f"This worker listens on {host}, so it needs a token: {token}", flush=True)
    return token


def _gpus(value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",") if part.strip()]
    except ValueError:
        raise InvalidInput(f"--gpu takes device numbers such as 0,1, not {value!r}") from None


def _options(values: list[str]) -> dict[str, str]:
    options = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not key or not equals:
            raise InvalidInput(f"--option takes KEY=VALUE, not {value!r}")
        options[key] = text
    return options


def _safe(name: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:40] or f"worker-{os.getpid()}"
