"""What a hive is told at its start."""

from __future__ import annotations

import re
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rbee.errors import InvalidRequest, SetupProblem
from rbee.wire.settings import DeclaredModel, HiveSettings, Tls, read_settings, secret_path

DEFAULT_PORT = 7835
LOAD_LIMIT_S = 600.0
HIVE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
INVENTORY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}")
EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Settings:
    """Checked settings. `worker_command` is what runs `rbee.worker`; its arguments follow."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    queen_url: str = ""
    name: str = ""
    token_file: Path | None = None
    parent_pid: int = 0
    ephemeral: bool = False
    worker_command: tuple[str, ...] = field(default_factory=lambda: (sys.executable, "-m", "rbee.worker"))
    load_limit_s: float = LOAD_LIMIT_S
    """How long a worker may load its model before it is ended."""
    tls: Tls | None = None
    """With it, this hive and its workers serve TLS only."""
    models: tuple[DeclaredModel, ...] = ()
    workers_folder: Path | None = None
    """The folder of the declared workers' settings; None: the inventory knows nothing of this machine."""
    worker_tokens: Path = Path("worker-tokens")
    authority: Path | None = None
    """Whose certificates this hive takes its workers' for."""

    @classmethod
    def checked(cls, **values: Any) -> Settings:
        """Return settings, the name filled in. Raises: InvalidRequest."""
        settings = cls(**{**values, "name": values.get("name") or local_name(socket.gethostname())})
        if not HIVE_NAME.fullmatch(settings.name):
            raise InvalidRequest(f"--name {settings.name!r} is not a host name", hint="a-z, 0-9, '-' and '.'")
        if not 0 <= settings.port <= 65535:
            raise InvalidRequest(f"--port {settings.port} is not between 0 and 65535")
        if settings.load_limit_s <= 0:
            raise InvalidRequest(
                f"--load-limit {settings.load_limit_s:g} is no time to load in", hint="seconds above 0"
            )
        if settings.queen_url and not settings.queen_url.startswith(("http://", "https://")):
            raise InvalidRequest(f"--queen {settings.queen_url!r} is no URL", hint="http://127.0.0.1:7833")
        return settings

    @classmethod
    def from_file(cls, file: Path) -> Settings:
        """Return what `apply` wrote, the secrets looked up in the unit's credentials. Raises: SetupProblem."""
        given = read_settings(file, HiveSettings)
        if not INVENTORY_NAME.fullmatch(given.name):
            raise SetupProblem(f"{file}: name: {given.name!r} is no host name", hint="rbee apply writes this file")
        authority = given.authority or (given.tls.authority if given.tls else "")
        return cls(
            host=given.host,
            port=given.port,
            name=given.name,
            token_file=secret_path(given.token_file),
            tls=_with_paths(given.tls),
            models=tuple(given.models),
            workers_folder=Path(given.workers),
            worker_tokens=secret_path(given.worker_tokens),
            authority=secret_path(authority) if authority else None,
        )

    @property
    def scheme(self) -> str:
        """How this hive and its workers are reached."""
        return "https" if self.tls else "http"

    @property
    def near_host(self) -> str:
        """The address by which this machine's own programs reach `host`."""
        host = "127.0.0.1" if self.host in EVERYWHERE else self.host
        return f"[{host}]" if ":" in host else host

    @property
    def drain_limit_s(self) -> float:
        """How long running jobs may take to end when the hive stops."""
        return 1.0 if self.ephemeral else 8.0

    @property
    def dialled_host(self) -> str:
        """The name under which others reach `host`: a wildcard address cannot be dialled from elsewhere."""
        host = socket.gethostname() if self.host in EVERYWHERE else self.host
        return f"[{host}]" if ":" in host else host


def _with_paths(tls: Tls | None) -> Tls | None:
    if tls is None:
        return None
    certificate, key, authority = (str(secret_path(one)) for one in (tls.certificate, tls.key, tls.authority))
    return Tls(certificate=certificate, key=key, authority=authority)


def local_name(host_name: str) -> str:
    """Return a machine's name for the fleet: its short host name, lowercase and safe, or "localhost"."""
    short = re.sub(r"[^a-z0-9-]+", "-", host_name.split(".")[0].lower()).strip("-")
    return short[:63] or "localhost"
