"""Prove to systemd, on each beat, that this hive lives (sd_notify(3))."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rbee.http.server import Server
from rbee.notify import Notifier

ACCEPTS_WITHIN_S = 5.0


class Pulse:
    """Beats from a thread of its own. `probe` takes every lock that a request takes, and so ends with them."""

    def __init__(self, notifier: Notifier, server: Server, probe: Callable[[], object]) -> None:
        self._notifier = notifier
        self._server = server
        self._probe = probe

    def start(self, status: str) -> None:
        """Tell that the hive is ready, and prove from now on that it lives."""
        self._notifier.send("READY=1", f"STATUS={status}")
        if self._notifier.watchdog_s:
            threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def stopping(self) -> None:
        """Tell that the hive ends; the beats go on until the process ends."""
        self._notifier.send("STOPPING=1", "STATUS=ending")

    def beat(self) -> bool:
        """Send a proof of life, unless connections are not accepted; return whether it was sent."""
        self._probe()
        if time.monotonic() - self._server.turned_at > ACCEPTS_WITHIN_S:
            return False
        self._notifier.send("WATCHDOG=1")
        return True

    def _run(self) -> None:
        while True:
            self.beat()
            time.sleep(self._notifier.watchdog_s / 4)
