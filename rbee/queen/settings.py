"""What a queen is told when it starts."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from rbee import paths
from rbee.logs import LogFormat
from rbee.queen.retention import RETENTION, Retention

OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


@dataclass(frozen=True)
class Settings:
    """The queen's settings; times are in seconds.

    `queue_limit` jobs wait for a model at most, each for `queue_timeout_s`; a less urgent priority gets its next job
    after `starvation_s`. `load_timeout_s` bounds the start of a worker, `first_byte_timeout_s` the wait for an answer
    to begin, `silence_timeout_s` the gap between two pieces of one, `drain_s` how long streams may go on after a
    SIGTERM.
    With `platform` the routing script is the operator's alone: it is replaced through the API, and the person's file
    is not read.
    `log_jobs` has a record logged for each job; with an `otlp_endpoint`, a trace of each is sent there.
    `declared` is True for a queen that `rbee apply` set up: her inventory must be there.
    `state` is the address of the Redis that server processes and queens share their live state in, and `slot` which of
    `processes` this one is; other queens reach this one at `advertise`.
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
    log_format: LogFormat = "text"
    log_jobs: bool = False
    otlp_endpoint: str = ""
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
    processes: int = 1
    slot: int = 0
    state: str = ""
    state_password: str = field(default="", repr=False)
    advertise: str = ""

    @property
    def shared(self) -> bool:
        """Return True when other server processes or queens share this one's live state."""
        return bool(self.state)

    @property
    def advertised(self) -> str:
        """Return where other queens reach this one; empty where nobody said it and it cannot be known."""
        if self.advertise or self.host in ("0.0.0.0", "::", ""):
            return self.advertise
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @property
    def traced(self) -> bool:
        """Return True when traces are wanted, by `otlp_endpoint` or OpenTelemetry's own environment variables."""
        told = os.environ.get
        if told("OTEL_SDK_DISABLED", "").lower() == "true" or told("OTEL_TRACES_EXPORTER") == "none":
            return False
        return bool(self.otlp_endpoint or any(map(told, OTLP_ENDPOINTS)))

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
        return self.state_dir / ("decisions.jsonl" if self.slot == 0 else f"decisions-{self.slot}.jsonl")

    @property
    def keys_path(self) -> Path:
        """Return the file of API keys."""
        return self.state_dir / "keys.sqlite"

    @property
    def records_dir(self) -> Path:
        """Return the folder of jobs, usage, files and batches: each server process has its own."""
        records = self.state_dir / "records"
        return records if self.slot == 0 else records / f"process-{self.slot}"

    @property
    def orphaned_records(self) -> list[Path]:
        """Return the records of processes that this queen does not have any more: the first one takes them over."""
        mine = {f"process-{slot}" for slot in range(1, self.processes)}
        folders = sorted((self.state_dir / "records").glob("process-*"))
        return [folder for folder in folders if folder.name not in mine] if self.slot == 0 else []

    @property
    def jwt_path(self) -> Path:
        """Return the file that names an issuer of tokens, whether it exists or not."""
        return self.inventory_dir / "jwt.yaml"

    @property
    def limits_path(self) -> Path:
        """Return the file that remembers what keys have used of their budgets."""
        return self.state_dir / ("limits.json" if self.slot == 0 else f"limits-{self.slot}.json")

    @property
    def fleet_path(self) -> Path:
        """Return the file that remembers which hives reported, for a queen that starts again."""
        return self.state_dir / "fleet.json"

    @property
    def inventory_memory(self) -> Path:
        """Return the file that remembers the last good inventory."""
        return self.state_dir / "inventory.json"
