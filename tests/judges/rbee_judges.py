"""What the judges' tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import openai

from rbee.testing.programs import RunningQueen, until
from rbee.wire.fleet import SpawnWorker, WorkerReport, WorkerState

HANG_GUARD_S = 120.0

StartEcho = Callable[..., str]
"""Start the one echo worker of the module's queen, with these options, and return its name."""


@contextmanager
def connect(url: str, key: str = "local") -> Iterator[openai.OpenAI]:
    """Give the `openai` package as the README sets it up; it never tries again by itself."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=HANG_GUARD_S) as made:
        yield made


def spawn_echo(queen: RunningQueen, **options: str) -> str:
    """Start an echo worker and return its name once it is ready."""
    hive = queen.status().hives[0].hive
    wanted = SpawnWorker(model="echo", backend="echo", options=options)
    name = queen.client.post(f"/v1/hives/{hive}/workers", wanted, WorkerReport).name
    until(lambda: state(queen, name) is WorkerState.READY, f"{name} to be ready")
    return name


def end_echo(queen: RunningQueen, name: str) -> None:
    """End a worker and wait until it is gone."""
    queen.client.delete(f"/v1/hives/{queen.status().hives[0].hive}/workers/{name}", WorkerReport)
    until(lambda: state(queen, name) in (None, WorkerState.STOPPED), f"{name} to end")


def state(queen: RunningQueen, name: str) -> WorkerState | None:
    """Return a worker's state, or None when its hive does not know it."""
    found = [worker.state for hive in queen.status().hives for worker in hive.workers if worker.name == name]
    return found[0] if found else None
