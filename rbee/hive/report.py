"""Tells the queen what this machine has: at once on change, and every 30 s."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

from rbee.client import Client
from rbee.errors import NotFound, RbeeError
from rbee.wire.fleet import HiveReport, WorkerReport

log = logging.getLogger("rbee.hive")

HEARTBEAT_S = 30.0
COALESCE_S = 0.02
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0
POST_LIMIT_S = 5.0


class Reporter:
    """One thread that reports to one queen; changes that come together go out in one report.

    A queen that is away is tried again with pauses that grow to 5 s; nothing is queued for her, because each report
    is the whole state.
    """

    def __init__(
        self,
        queen_url: str,
        token: str,
        build: Callable[[], HiveReport],
        worker: Callable[[str], WorkerReport],
        *,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._heartbeat_s = heartbeat_s
        self._client = Client(queen_url, token=token, timeout_s=POST_LIMIT_S) if queen_url else None
        self._build = build
        self._worker = worker
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._newly_ready: set[str] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="report", daemon=True)

    def start(self) -> None:
        """Report now, and from now on."""
        if self._client is not None:
            self._wake.set()
            self._thread.start()

    def changed(self) -> None:
        """Have the change reported."""
        self._wake.set()

    def became_ready(self, name: str) -> None:
        """Have it told that a worker answers, ahead of the next whole report."""
        with self._lock:
            self._newly_ready.add(name)
        self._wake.set()

    def stop(self) -> None:
        """Send what is not sent yet, once, and end."""
        if self._client is None or self._stopped.is_set():
            return
        self._stopped.set()
        self._wake.set()
        self._thread.join(2.0)
        self._client.close()

    def _run(self) -> None:
        failures = 0
        while not self._stopped.is_set():
            self._wake.wait(self._heartbeat_s)
            self._wake.clear()
            if not self._newly_ready:
                self._stopped.wait(COALESCE_S)
                self._wake.clear()
            problem = self._send(POST_LIMIT_S)
            self._tell(problem, failures)
            failures = failures + 1 if problem else 0
            if problem:
                self._wake.set()
                self._stopped.wait(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures - 1, 10)))
        if not failures:
            self._send(1.0)

    def _send(self, limit_s: float) -> RbeeError | None:
        assert self._client is not None
        try:
            self._send_newly_ready(self._client, limit_s)
            self._client.post("/v1/orchestrator/hive-report", self._build(), Any, timeout_s=limit_s)
        except RbeeError as problem:
            return problem
        except Exception as problem:  # a report must never end the thread that sends the next one
            log.exception("the report could not be made")
            return RbeeError(repr(problem))
        return None

    def _send_newly_ready(self, client: Client, limit_s: float) -> None:
        with self._lock:
            names = set(self._newly_ready)
        for name in names:
            with contextlib.suppress(NotFound):  # it is gone again
                client.post("/v1/orchestrator/worker-ready", self._worker(name), Any, timeout_s=limit_s)
            with self._lock:
                self._newly_ready.discard(name)

    def _tell(self, problem: RbeeError | None, failures: int) -> None:
        """Log the first failure of a row and its end, not each try."""
        if problem and not failures:
            log.warning("the queen does not take reports: %s. It is tried again until she does", problem)
        elif failures and not problem:
            log.info("the queen takes reports again, after %d tries", failures)
