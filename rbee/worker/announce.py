"""Tell the hive that this worker answers, or why it never will."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from rbee.client import Client
from rbee.errors import RbeeError
from rbee.http.tls import client_context
from rbee.wire.fleet import WorkerReady, WorkerSpec, WorkerState

log = logging.getLogger("rbee.worker")

PATIENCE_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 2.0, 5.0, 5.0, 5.0, 5.0, 5.0)
"""The pauses between tries: a hive that restarts is back within them."""
BAD_NEWS_TRIES = 6
"""A worker that failed ends; its hive notices that as well."""


def announce(spec: WorkerSpec, ready: WorkerReady, stop: threading.Event) -> bool:
    """Post `ready` to the hive until it takes it, `stop` is set or patience ends; return whether it took it."""
    hive_url = spec.hive_url
    tls = client_context(Path(spec.authority)) if spec.authority else None
    client = Client(hive_url, token=spec.token, timeout_s=5.0, tls=tls)
    try:
        patience_s = PATIENCE_S[:BAD_NEWS_TRIES] if ready.state == WorkerState.FAILED else PATIENCE_S
        for pause_s in (*patience_s, None):
            try:
                client.send("POST", "/v1/workers/ready", ready).read()
                return True
            except RbeeError as problem:
                reason = problem
            if pause_s is None or stop.wait(pause_s):
                break
        log.warning("the hive at %s did not take the news that this worker is %s: %s", hive_url, ready.state, reason)
        return False
    finally:
        client.close()
