"""What an inventory means: hosts, their workers and their models, each with the line that says so."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from rbee.errors import Mistake
from rbee.wire.fleet import WorkerName


class At(Struct, frozen=True, order=True):
    """A line of an inventory file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class WorkerLine(Struct, frozen=True, kw_only=True):
    """One `Worker NAME key=value…` line; zero and empty mean that the engine or the hive takes its default.

    `port` is never zero: a line without one is given the first free port from 8001 on, in the order of the lines.
    With `url` the worker is any OpenAI-compatible server, which rbee neither starts nor stops; its `port` is 0, and
    `upstream_model` is the name that the model has there when it is not `model`.
    """

    name: WorkerName
    at: At
    model: str = ""
    backend: str = ""
    device: str = ""
    gpus: list[int] = []
    port: int = 0
    context_tokens: int = 0
    slots: int = 0
    threads: int = 0
    pin: bool = False
    idle_s: float = 0.0
    start_limit_s: float = 0.0
    memory_bytes: int = 0
    url: str = ""
    key_file: str = ""
    upstream_model: str = ""
    capabilities: list[str] = []
    options: dict[str, str] = {}


class ModelLine(Struct, frozen=True, kw_only=True):
    """One `Model NAME source=… sha256=…` line. `source` is `file:PATH` (absolute by now), `https://…` or `hf:…`."""

    name: str
    at: At
    source: str = ""
    sha256: str = ""


class Gitops(Struct, frozen=True, kw_only=True):
    """The `RbeeGitops` line: the git repository whose inventory folder `path` the fleet follows."""

    at: At
    repository: str
    branch: str = "main"
    path: str = "inventory"
    interval_s: float = 60.0
    require_signed: bool = False
    key_file: str = ""
    """The private key with which the reconciler reaches hosts and repository; absolute, on the controller."""


class Host(Struct, frozen=True, kw_only=True):
    """One machine: a literal `Host` name of the inventory."""

    name: str
    at: At
    hostname: str
    user: str
    port: int = 22
    hive_port: int = 7835
    """The port of the hive on this host; 0 (`HivePort none`) when none runs there."""
    queen_port: int = 0
    """The port of the queen that runs on this host; 0 when none does."""
    workers: list[WorkerLine] = []
    models: list[ModelLine] = []
    """Every model that a worker of this host may name."""
    gpus: list[str] = []
    region: str = ""
    tags: list[str] = []
    price: float = 0.0
    """What an hour here costs (`RbeePrice`), in a currency of the operator's own."""
    tenant: str = ""
    """The only tenant whose jobs may run here (`RbeeTenant`); empty: every tenant's."""
    wave: int = 0
    python: str = "python3"
    run_as: str = "rbee"
    """The system user that hive and queen run as (`RbeeUser`)."""
    gitops: Gitops | None = None
    """On the queen's host: the repository that the fleet follows."""
    origins: dict[str, At] = {}
    """Which line each value came from, by lower-case keyword; what is missing here is a default."""

    @property
    def is_member(self) -> bool:
        """Whether rbee runs anything here; a jump host (`HivePort none`) is none of the fleet's machines."""
        return bool(self.hive_port or self.queen_port or self.workers)


class Fleet(Struct, frozen=True, kw_only=True):
    """Everything that an inventory folder says."""

    folder: Path
    files: list[Path]
    """The inventory's own files; what they include is in `included`."""
    included: list[Path] = []
    hosts: list[Host]
    sha256: str
    """Of all these files, in order: two equal ones mean the same fleet."""
    warnings: list[Mistake] = []
    """What is doubtful, but does not keep the fleet from being used."""

    def host(self, name: str) -> Host | None:
        """Return the host of this name, or None."""
        return next((host for host in self.hosts if host.name == name), None)

    @property
    def queens(self) -> list[Host]:
        """The hosts that run a queen."""
        return [host for host in self.hosts if host.queen_port]
