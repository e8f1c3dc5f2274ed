"""Starting a worker: through the queen, or on this machine's hive where no queen runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import click
import msgspec
from msgspec import Struct

from rbee.cli.terminal import Waiting
from rbee.client import Client
from rbee.errors import InvalidInput, LoadFailed, NotFound, TimedOut, Unreachable
from rbee.paths import state_dir
from rbee.wire.fleet import HiveView, SpawnWorker, WorkerReport, WorkerState

DEVICES = ("cpu", "cuda", "metal", "rocm")
LOAD_TIMEOUT_S = 1800.0
"""The hive ends a load that takes too long; this only bounds the wait for a hive that says nothing."""
LOOK_EVERY_S = 0.1


class Starter(Protocol):
    """What can start a worker and tell how it fares."""

    def spawn(self, wanted: SpawnWorker) -> WorkerReport:
        """Ask for a worker; it is loading then."""

    def workers(self) -> list[WorkerReport]:
        """Return the workers there."""


@dataclass(frozen=True)
class ThroughQueen:
    """One hive, reached through the queen."""

    client: Client
    hive: str

    def spawn(self, wanted: SpawnWorker) -> WorkerReport:
        return self.client.post(f"/v1/hives/{self.hive}/workers", wanted, WorkerReport)

    def workers(self) -> list[WorkerReport]:
        views = self.client.get("/v1/hives", list[HiveView])
        return [worker for view in views if view.hive == self.hive for worker in view.workers]


class _HiveRecord(Struct, frozen=True):
    url: str


@dataclass(frozen=True)
class LocalHive:
    """The hive of this machine, which runs under the same person."""

    client: Client

    @classmethod
    def running(cls) -> LocalHive:
        """Return the hive that runs. Raises: Unreachable when none does."""
        try:
            record = msgspec.json.decode((state_dir() / "hive.json").read_bytes(), type=_HiveRecord)
            token = (state_dir() / "hive.token").read_text().strip()
            client = Client(record.url, token=token)
            client.send("GET", "/health").close()
        except (FileNotFoundError, msgspec.DecodeError, Unreachable):
            raise Unreachable(
                "No hive is running on this machine", hint="rbee-hive daemon, or rbee queen start"
            ) from None
        return cls(client)

    def spawn(self, wanted: SpawnWorker) -> WorkerReport:
        return self.client.post("/v1/workers", wanted, WorkerReport)

    def workers(self) -> list[WorkerReport]:
        return self.client.get("/v1/workers", list[WorkerReport])


def request(
    model: str,
    *,
    backend: str = "",
    device: str = "",
    gpu: str | None = None,
    name: str = "",
    port: int = 0,
    ctx: int = 0,
    slots: int = 0,
    threads: int = 0,
    options: Mapping[str, str] = {},
) -> SpawnWorker:
    """Return what to ask a hive for; `backend` is an engine's name, or a device's.

    Raises: InvalidInput when two devices are named, or GPUs without a device that has any.
    """
    if backend in DEVICES:
        if device and device != backend:
            raise InvalidInput(f"--backend {backend} and --device {device} name two devices", hint="one of them")
        backend, device = "", backend
    device = device or "cpu"
    if gpu is not None and (device == "cpu" or not all(p.isascii() and p.isdigit() for p in gpu.split(","))):
        raise InvalidInput(f"--gpu {gpu} is not for {device}", hint="numbers from 0, as in: --device cuda --gpu 0,1")
    return SpawnWorker(
        model=model,
        backend=backend,
        name=name,
        device=device,
        gpus=[int(part) for part in gpu.split(",")] if gpu else [],
        port=port,
        context_tokens=ctx,
        slots=slots,
        threads=threads,
        options=dict(options),
    )


def spawn(starter: Starter, wanted: SpawnWorker, *, wait: bool) -> WorkerReport:
    """Start a worker and print its name. Raises: LoadFailed with the reason, TimedOut."""
    with Waiting(f"starting a worker for {wanted.model}") as waiting:
        report = starter.spawn(wanted)
        if wait:
            report = _until_ready(starter, report, waiting)
    click.echo(report.name)
    return report


def _until_ready(starter: Starter, report: WorkerReport, waiting: Waiting) -> WorkerReport:
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    seen = False
    while time.monotonic() < deadline:
        current = next((worker for worker in starter.workers() if worker.name == report.name), None)
        if current is None and seen:
            raise NotFound(f"The worker {report.name} was stopped while it loaded")
        if current is not None:
            seen = True
            if current.state == WorkerState.READY:
                return current
            if current.state == WorkerState.FAILED:
                raise LoadFailed(
                    f"The worker {report.name} failed: {current.reason}", hint=f"rbee worker logs {report.name}"
                )
            waiting.step(
                f"loading {report.model} {current.progress:.0%}" if current.progress else f"loading {report.model}"
            )
        time.sleep(LOOK_EVERY_S)
    raise TimedOut(f"The worker {report.name} was not ready within {LOAD_TIMEOUT_S:g} s", hint="rbee worker list")
