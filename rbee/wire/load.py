"""What is going on in a queen at this moment: the body of `GET /v1/orchestrator/load`."""

from __future__ import annotations

from msgspec import Struct

from rbee.wire.fleet import Device, Problem, WorkerState


class WorkerLoad(Struct, frozen=True, kw_only=True):
    """One worker. `tokens_per_second` is of the last seconds, all its jobs together; a chunk of a stream is a token."""

    id: str
    model: str
    backend: str
    device: str
    state: WorkerState
    slots: int
    in_flight: int
    elsewhere: int = 0
    """How many of those are jobs of other processes and queens, as far as this process has heard of them."""
    ejected: bool = False
    """Jobs go elsewhere for a while, because many failed here."""
    lost: bool = False
    """It broke a connection, and whether it still lives is being found out."""
    tokens_per_second: float = 0.0
    ttft_ms: float = 0.0
    """How long answers took to begin of late; 0 before the first one."""
    progress: float = 0.0
    """How far it has started, 0 to 1."""
    reason: str = ""


class HiveLoad(Struct, frozen=True, kw_only=True):
    """One machine; `state` is that of its HiveView."""

    hive: str
    state: str
    reason: str = ""
    region: str = ""
    devices: list[Device] = []
    workers: list[WorkerLoad] = []


class QueueLoad(Struct, frozen=True, kw_only=True):
    """Those who wait for their turn at a model, of one priority."""

    model: str
    priority: str
    waiting: int
    longest_wait_s: float


class QueenLoad(Struct, frozen=True, kw_only=True):
    """Everything at a glance. What is `_per_second` is a mean of the last `window_s`."""

    version: str
    url: str
    pid: int
    at: float
    started_at: float
    draining: bool = False
    window_s: float = 0.0
    in_flight: int = 0
    waiting: int = 0
    jobs_per_second: float = 0.0
    tokens_per_second: float = 0.0
    refused_per_second: float = 0.0
    retries_per_second: float = 0.0
    hives: list[HiveLoad] = []
    queues: list[QueueLoad] = []
    problems: list[Problem] = []
