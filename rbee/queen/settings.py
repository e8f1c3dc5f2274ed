"""What a queen is told when it starts."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path

from rbee import paths
from rbee.queen.retention import RETENTION, Retention


@dataclass(frozen=True)
class Settings:
    """The queen's settings; times are in seconds.

    `queue_limit` jobs wait for a model at most, each for `queue_timeout_s`; a less urgent priority gets its next job
    after `starvation_s`. `load_timeout_s` bounds the start of a worker, `first_byte_timeout_s` the wait for an answer
    to begin, `silence_timeout_s` the gap between two pieces of one, `drain_s` how long streams may go on after a
    SIGTERM.
    With `platform` the routing script is the operator's alone: it is replaced through the API, and the person's file
    is not read.
    `declared` is True for a queen that `rbee apply` set up: her inventory must be there.
    """

    host: str = "127.0.0.1"
    port: int = 7833
    hive_port: int = 7835
    run_hive: bool = True
    inventory: Path | None = None
    identity: Path | None = None
    gitops: Path | None = None
    declared: bool = False
    platform: bool = False
    state_dir: Path = field(default_factory=paths.state_dir)
    config_dir: Path = field(default_factory=paths.config_dir)
    parent_pid: int = 0
    ephemeral: bool = False
    require_key: bool = False
    admin_token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    hive_token: str = field(default="", repr=False)
    max_in_flight: int = 2048
    queue_limit: int = 256
    queue_timeout_s: float = 600.0
    starvation_s: float = 30.0
    load_timeout_s: float = 600.0
    first_byte_timeout_s: float = 900.0
    silence_timeout_s: float = 300.0
    choice_timeout_s: float = 30.0
    ping_s: float = 2.0
    retention: Retention = RETENTION
    drain_s: float = 30.0

    @property
    def inventory_dir(self) -> Path:
        """Return the folder of the inventory, whether it exists or not."""
        return self.inventory or self.config_dir

    @property
    def identity_dir(self) -> Path:
        """Return the folder of the fleet's key and authority."""
        return self.identity or self.inventory_dir / ".rbee"

    @property
    def script_path(self) -> Path:
        """Return where the routing script lies, whether it exists or not: the person's, or the platform's own."""
        return self.state_dir / "platform.rhai" if self.platform else self.inventory_dir / "scheduler.rhai"

    @property
    def script_memory(self) -> Path:
        """Return the file that remembers the last routing script that compiled."""
        return self.state_dir / ("platform.last-good.rhai" if self.platform else "scheduler.last-good.rhai")

    @property
    def decisions_path(self) -> Path:
        """Return the file of the routing decisions of late."""
        return self.state_dir / "decisions.jsonl"

    @property
    def keys_path(self) -> Path:
        """Return the file of API keys."""
        return self.state_dir / "keys.sqlite"

    @property
    def records_dir(self) -> Path:
        """Return the folder of jobs, usage, files and batches."""
        return self.state_dir / "records"

    @property
    def jwt_path(self) -> Path:
        """Return the file that names an issuer of tokens, whether it exists or not."""
        return self.inventory_dir / "jwt.yaml"

    @property
    def limits_path(self) -> Path:
        """Return the file that remembers what keys have used of their budgets."""
        return self.state_dir / "limits.json"

    @property
    def fleet_path(self) -> Path:
        """Return the file that remembers which hives reported, for a queen that starts again."""
        return self.state_dir / "fleet.json"

    @property
    def inventory_memory(self) -> Path:
        """Return the file that remembers the last good inventory."""
        return self.state_dir / "inventory.json"
