"""What a reconciler follows, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What a reconciler follows, and how. `identity` is the folder of the fleet's secrets, which no commit holds."""

    repository: str
    branch: str
    path: str
    folder: Path
    identity: Path
    interval_s: float = 60.0
    drift_interval_s: float = 600.0
    heal: bool = True
    require_signed: bool = False
    signers: Path | None = None
    ssh_key: Path | None = None
    known_hosts: Path | None = None

    @property
    def source(self) -> str:
        """What is followed, in one word."""
        return f"{self.repository}#{self.branch}:{self.path}"
