"""What hives and workers tell the queen, and what the queen tells them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from msgspec import Meta, Struct, field

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:@+-]{0,95}$"
"""Names of models and workers: never a path, never an option, safe in a unit name or a log line."""

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
WorkerName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
HiveName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,252}$")]
Count = Annotated[int, Meta(ge=0)]


class WorkerState(StrEnum):
    """A worker's state; `hive.workers` holds the table of who moves it."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Device(Struct, frozen=True, kw_only=True):
    """One thing a model can run on. `kind` is cpu, cuda, rocm or metal; `index` counts within the kind."""

    kind: str
    index: int = 0
    name: str = ""
    memory_total_bytes: Count = 0
    memory_free_bytes: Count = 0


class ModelReport(Struct, frozen=True, kw_only=True):
    """One model file that a hive can load."""

    name: str
    path: str = ""
    format: str = ""
    size_bytes: Count = 0
    architecture: str = ""
    parameters: Count = 0
    context_tokens: Count = 0
    quantization: str = ""
    capabilities: list[str] = []
    builtin: bool = False
    added_at: float = 0.0
    problem: str = ""
    """Why the file cannot be loaded at present (it was moved, say); empty when it can."""


class EngineReport(Struct, frozen=True, kw_only=True):
    """One installed backend, or why it cannot be used."""

    name: str
    package: str = ""
    version: str = ""
    summary: str = ""
    shape: str = ""
    capabilities: list[str] = []
    features: list[str] = []
    formats: list[str] = []
    devices: list[str] = []
    options: dict[str, str] = {}
    problem: str = ""


class WorkerAccess(Struct, frozen=True, kw_only=True):
    """How the queen reaches a worker: its front, its engine when on the same host, and the token of both."""

    url: str
    engine_url: str = ""
    token: str = ""


class WorkerReport(Struct, frozen=True, kw_only=True):
    """One worker as its hive sees it."""

    name: str
    model: str
    backend: str
    state: WorkerState
    device: str = "cpu"
    capabilities: list[str] = []
    features: list[str] = []
    slots: Count = 1
    context_tokens: Count = 0
    port: Count = 0
    pid: Count = 0
    memory_bytes: Count = 0
    progress: float = 0.0
    reason: str = ""
    since: float = 0.0
    started_at: float = 0.0
    declared: bool = False
    """The inventory names it and systemd runs it, so the hive neither starts nor stops it."""
    pinned: bool = False
    """It must never be ended to make room for another one."""
    access: WorkerAccess | None = None


class HiveReport(Struct, frozen=True, kw_only=True):
    """Everything a hive knows, sent every 30 s and on change.

    `epoch` is raised at each start of the hive and `sequence` at each report, so that a late one is recognised.
    """

    hive: HiveName
    url: str
    version: str
    epoch: float
    sequence: int
    pid: Count = 0
    devices: list[Device] = []
    engines: list[EngineReport] = []
    models: list[ModelReport] = []
    workers: list[WorkerReport] = []


class SpawnWorker(Struct, frozen=True, kw_only=True):
    """Ask a hive to start a worker. Empty or zero means that the hive takes its default."""

    model: Name
    backend: str
    name: str = ""
    device: str = "cpu"
    gpus: Annotated[list[Annotated[int, Meta(ge=0, le=255)]], Meta(max_length=64)] = []
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    context_tokens: Annotated[int, Meta(ge=0, le=16_777_216)] = 0
    slots: Annotated[int, Meta(ge=0, le=1024)] = 0
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    options: dict[str, str] = {}


class AddModel(Struct, frozen=True, kw_only=True):
    """Ask a hive to list a model file that lies on its disk."""

    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    name: str = ""


class WorkerSpec(Struct, frozen=True, kw_only=True):
    """All that a worker process is told, in a file of mode 0600 that it reads once."""

    name: str
    backend: str
    model: str
    path: str = ""
    format: str = ""
    capabilities: list[str] = []
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    token: str = ""
    engine_socket: str = ""
    hive_url: str = ""
    device: str = "cpu"
    gpus: list[int] = []
    context_tokens: Count = 0
    slots: Count = 0
    threads: Count = 0
    options: dict[str, str] = {}
    parent_pid: Count = 0
    certificate: str = ""
    key: str = ""
    """Files (PEM) with which the worker serves TLS; empty: plain HTTP."""
    authority: str = ""
    """The file (PEM) of the authority by which it knows its hive, when `hive_url` is https."""


class WorkerReady(Struct, frozen=True, kw_only=True):
    """A worker tells its hive that it answers (or, with `reason`, why it never will)."""

    name: str
    pid: int
    port: int
    state: WorkerState
    engine_url: str = ""
    capabilities: list[str] = []
    features: list[str] = []
    slots: Count = 1
    context_tokens: Count = 0
    reason: str = ""


class WorkerHealth(Struct, frozen=True, kw_only=True):
    """The body of a worker's `/health`; `status` is loading, ready, draining or failed."""

    status: str
    name: str
    model: str
    backend: str
    in_flight: int = 0
    slots: int = 0
    context_tokens: int = 0
    progress: float = 0.0
    reason: str = ""
    memory_bytes: Count = 0
    capabilities: list[str] = []
    features: list[str] = []


class Problem(Struct, frozen=True, kw_only=True):
    """Something a person should know about, with where and what to try."""

    where: str
    message: str
    since: float = 0.0


class HiveView(Struct, frozen=True, kw_only=True):
    """A hive as the queen believes it to be; `state` is connecting, ready, unreachable (both for `reason`) or lost.

    `last_report_s` is negative, and `version` empty, for a host of the inventory that has never reported.
    """

    hive: str
    url: str
    version: str
    state: str
    last_report_s: float
    reason: str = ""
    since: float = 0.0
    region: str = ""
    tags: list[str] = []
    devices: list[Device] = []
    engines: list[EngineReport] = []
    models: list[ModelReport] = []
    workers: list[WorkerReport] = []


class ProcessView(Struct, frozen=True, kw_only=True):
    """One server process of a queen: its slot, what it is doing, and how many other queens it hears."""

    slot: int
    pid: int
    started_at: float
    in_flight: int = 0
    waiting: int = 0
    state_reached: bool = True
    queens: Count = 0


class SharedStateView(Struct, frozen=True, kw_only=True):
    """The Redis that processes and queens share, and why it is not reached; `queens` are the others, by name."""

    url: str
    reached: bool
    since: float
    problem: str = ""
    queen: str = ""
    queens: dict[str, str] = {}


class QueenStatus(Struct, frozen=True, kw_only=True):
    """The body of `GET /v1/orchestrator/status`."""

    version: str
    pid: int
    url: str
    started_at: float
    draining: bool = False
    in_flight: int = 0
    scheduler: str = ""
    scheduler_error: str = ""
    hives: list[HiveView] = []
    problems: list[Problem] = []
    processes: list[ProcessView] = []
    """The server processes that answer, where they share their state."""
    shared_state: SharedStateView | None = None


class QueenRecord(Struct, frozen=True, kw_only=True):
    """`queen.json` in the state folder: how other programs of the same person find the running queen."""

    pid: int
    port: int
    host: str
    version: str
    started_at: float
    token: str
    ephemeral: bool = False
    log: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
