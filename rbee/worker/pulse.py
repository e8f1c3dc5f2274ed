"""Tell systemd how this worker stands, and prove on each beat that it lives."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable

from rbee.http.server import Server
from rbee.notify import Notifier
from rbee.plugin import ServingBackend
from rbee.worker.relay import engine_metrics
from rbee.worker.runner import Runner

LONGEST_BEAT_S = 5.0
LOADING_BEAT_S = 0.5
EXTENSION_S = 120
"""How much longer a start may take after each step that its load has made."""
ACCEPTS_WITHIN_S = 5.0
DECODE_STEP_S = 20.0
"""llama.cpp answers for its counters between two steps of decoding; a step takes long where a machine is slow."""
SERVING_STALL_S = 120.0
LIBRARY_STALL_S = 600.0
"""How long jobs may run without any progress. A library may read a long prompt in one call, in which nothing moves;
an engine that serves is asked for its own counters, which its decoding loop answers."""


class Pulse:
    """The messages of one worker to systemd (sd_notify(3)). Proof of life comes from what would stop in a deadlock:
    the loop that accepts connections, the runner's lock, and the progress of the jobs that run.
    """

    def __init__(
        self,
        runner: Runner,
        server: Server,
        notifier: Notifier,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._server = server
        self._clock = clock
        self._notifier = notifier
        self._tell = notifier.send
        self._woken = threading.Event()
        self._said = ""
        self._told_ready = False
        self._progress: tuple[int, bytes] = (0, b"")
        self._moved_at = clock()
        self._stall_s = SERVING_STALL_S if isinstance(runner.backend, ServingBackend) else LIBRARY_STALL_S
        self._beat_s = min(LONGEST_BEAT_S, notifier.watchdog_s / 4 or LONGEST_BEAT_S)

    def start(self) -> None:
        """Beat from a thread of its own, where systemd listens."""
        if self._notifier.address:
            threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def changed(self) -> None:
        """Have the state told at once."""
        self._woken.set()

    def stopping(self) -> None:
        """Tell that the worker ends."""
        self._tell("STOPPING=1", f"STATUS=ending, {self._runner.in_flight} jobs in flight")

    def failed(self, reason: str) -> None:
        """Tell why the worker ends."""
        self._tell(f"STATUS=failed: {reason}", f"ERRNO={errno.EIO}")

    def beat(self) -> None:
        """Tell what is new, and that this worker lives when it does."""
        runner = self._runner
        if runner.status == "loading":
            # A load that does not tell how far it is has the unit's own limit.
            more = (f"EXTEND_TIMEOUT_USEC={EXTENSION_S}000000",) if runner.progress else ()
            self._say(f"loading {runner.spec.model}, {runner.progress:.0%}", *more)
        elif runner.status == "ready":
            first = () if self._told_ready else ("READY=1",)
            self._told_ready = True
            self._say(f"ready, {runner.spec.model} with {runner.spec.backend}", *first)
        elif runner.status == "draining":
            self._say("draining")
        if self.lives():
            self._tell("WATCHDOG=1")

    def lives(self) -> bool:
        """Return False when connections are not accepted, or when jobs run and nothing of them moves."""
        moment = self._clock()
        if moment - self._server.turned_at > ACCEPTS_WITHIN_S:
            return False
        in_flight, moves = self._runner.moves()
        if not in_flight or moves != self._progress[0]:
            self._moved_at, self._progress = moment, (moves, b"")
        elif self._runner.upstream is not None:
            counters = engine_metrics(self._runner.upstream, DECODE_STEP_S)
            if counters and counters != self._progress[1]:
                self._moved_at, self._progress = moment, (moves, counters)
        return moment - self._moved_at < self._stall_s

    def _run(self) -> None:
        while not self._runner.over.is_set():
            self.beat()
            self._woken.wait(LOADING_BEAT_S if self._runner.status == "loading" else self._beat_s)
            self._woken.clear()

    def _say(self, status: str, *more: str) -> None:
        if status != self._said:
            self._said = status
            self._tell(f"STATUS={status}", *more)
