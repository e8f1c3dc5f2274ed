"""This machine's hive as a child of the queen's master process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time

from rbee.queen.settings import Settings

log = logging.getLogger("rbee.queen.hive")

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
STABLE_AFTER_S = 60.0
STOP_S = 20.0


class HiveProcess:
    """Starts the hive, starts it again when it dies (with a growing pause), and ends it with the queen."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pid = 0
        self._started_at = 0.0
        self._next_start_at = 0.0
        self._wait_s = FIRST_WAIT_S

    def start(self) -> None:
        """Start the hive now."""
        self._started_at = time.monotonic()
        # posix_spawn, and no Popen: gunicorn reaps every child itself, and a Popen would wait for one that is gone.
        self._pid = os.posix_spawn(sys.executable, self._command(), dict(os.environ), setpgroup=0)

    def keep(self) -> None:
        """Start the hive again when it has died and its pause is over."""
        if self._pid and _alive(self._pid):
            return
        now = time.monotonic()
        if self._pid:
            if now - self._started_at > STABLE_AFTER_S:
                self._wait_s = FIRST_WAIT_S
            log.warning("the hive (pid %d) has ended; it starts again in %g s", self._pid, self._wait_s)
            self._pid = 0
            self._next_start_at = now + self._wait_s
            self._wait_s = min(self._wait_s * 2, LONGEST_WAIT_S)
        if now >= self._next_start_at:
            self.start()

    def stop(self) -> None:
        """End the hive and, through it, its workers. Waits at most 20 s, then kills it."""
        if not self._pid:
            return
        deadline = time.monotonic() + STOP_S
        _signal(self._pid, signal.SIGTERM)
        while _alive(self._pid):
            if time.monotonic() > deadline:
                _signal(self._pid, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.02)
        self._pid = 0

    def _command(self) -> list[str]:
        settings = self._settings
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "::", "localhost") else settings.host
        command = [
            sys.executable,
            "-m",
            "rbee.hive",
            "run",
            "--port",
            str(settings.hive_port),
            "--queen",
            f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}",
            "--token-file",
            str(settings.state_dir / "hive.token"),
            "--parent",
            str(os.getpid()),
        ]
        # Its log goes where the queen's goes.
        command += ["--log-format", settings.log_format]
        return [*command, "--ephemeral"] if settings.ephemeral else command


def _alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        reaped, _ = os.waitpid(pid, os.WNOHANG)
        return reaped == 0
    # Reaped by gunicorn already.
    return False


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
