"""Take rbee off a host: what would go, and its end."""

from __future__ import annotations

import getpass
import socket
import time
from typing import Any

from msgspec import Struct

from rbee.apply.records import add_to_log
from rbee.apply.ssh import Session

PURGE_LIMIT_S = 300.0


class Found(Struct, frozen=True, kw_only=True):
    """What rbee owns on a host."""

    units: list[str] = []
    running: list[str] = []
    releases: int = 0
    models: list[str] = []
    models_bytes: int = 0

    def is_empty(self, *, models: bool) -> bool:
        """Tell whether there is nothing to remove; model files count when they would be removed too."""
        return not (self.units or self.releases or (models and self.models))


def find(session: Session) -> Found:
    """Lock the host and tell what rbee owns there. Raises: HostProblem."""
    session.ask("lock", who=f"{getpass.getuser()}@{socket.gethostname()}")
    seen = session.ask("observe")
    return Found(
        units=sorted(path.rpartition("/")[2] for path in seen["files"] if path.startswith("/etc/systemd/")),
        running=sorted(name for name, unit in seen["units"].items() if unit.get("ActiveState") == "active"),
        releases=len(seen["releases"]),
        models=sorted(seen["models"]),
        models_bytes=sum(model["size_bytes"] for model in seen["models"].values()),
    )


def purge(session: Session, *, models: bool) -> dict[str, Any]:
    """Stop and remove what rbee owns on the host; running jobs may end first. Raises: HostProblem."""
    told: dict[str, Any] = session.ask("purge", limit_s=PURGE_LIMIT_S, models=models)
    return told


def note(host: str, what: str, inventory: str) -> None:
    """Add to this machine's own log that a host was purged or forgotten."""
    line = {"at": time.time(), "who": getpass.getuser(), "what": what, "inventory": inventory}
    add_to_log({**line, "hosts": {host: [{"purge": "purged", "forget": "forgotten"}[what], 0, ""]}})
