"""What the queen knows about a name: for completion in the shell, and for a word of progress while a model loads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import click

from rbee.cli import local_queen
from rbee.cli.door import Address
from rbee.client import Client
from rbee.errors import RbeeError
from rbee.wire.fleet import QueenStatus, WorkerState

COMPLETION_TIMEOUT_S = 0.3
PROGRESS_EVERY_S = 0.5


def complete_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the models of the running queen that begin with `incomplete`; none when it does not answer at once."""
    record = local_queen.find()
    if record is None:
        return []
    with contextlib.closing(
        Client(local_queen.url_of(record), token=record.token, timeout_s=COMPLETION_TIMEOUT_S)
    ) as client:
        try:
            listed = client.get("/v1/models", dict[str, Any])
        except RbeeError:
            return []
    return [card["id"] for card in listed.get("data", []) if str(card["id"]).startswith(incomplete)]


def progress_of(address: Address, model: str) -> Callable[[], str]:
    """Return a function that tells how far a model is loaded ("63 %"), asking the queen at most twice a second."""
    client = Client(address.url, token=address.token, timeout_s=1.0)
    said, asked_at = "", 0.0

    def progress() -> str:
        nonlocal said, asked_at
        if time.monotonic() - asked_at >= PROGRESS_EVERY_S:
            asked_at = time.monotonic()
            with contextlib.suppress(RbeeError):
                said = _loading(client.get("/v1/orchestrator/status", QueenStatus), model)
        return said

    return progress


def _loading(status: QueenStatus, model: str) -> str:
    loading = [
        worker.progress
        for hive in status.hives
        for worker in hive.workers
        if worker.model == model and worker.state == WorkerState.STARTING
    ]
    return f"{max(loading):.0%}".replace("%", " %") if loading and max(loading) > 0 else ""
