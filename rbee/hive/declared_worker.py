"""One declared worker as this hive sees it: its unit, its own word, and the report made of both."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec

from rbee.errors import RbeeError
from rbee.hive import units
from rbee.hive.declared_state import Seen, judge
from rbee.hive.launch import CHATTER
from rbee.hive.ports import can_bind
from rbee.http.upstream import Upstream
from rbee.wire.fleet import ModelReport, WorkerAccess, WorkerHealth, WorkerReport, WorkerState
from rbee.wire.settings import WorkerSettings

log = logging.getLogger("rbee.hive")

LOOK_S = 0.2
STEADY_S = 2.0
UNIT_S = 10.0
"""How often systemd is asked about a worker that is ready; a start or a closed connection asks at once."""
HEALTH_LIMIT_S = 2.0
LAST_WORDS_LINES = 5
MOVING = (WorkerState.STARTING, WorkerState.DRAINING)
ALIVE = (*MOVING, WorkerState.READY)


@dataclass(frozen=True)
class Belief:
    """What is believed of a worker after the last look."""

    state: WorkerState = WorkerState.STOPPED
    reason: str = ""
    since: float = field(default_factory=time.time)
    unit: units.Unit = field(default_factory=units.Unit)
    health: WorkerHealth | None = None


class DeclaredWorker:
    """Watches one worker from a thread of its own, so that one that hangs hinders no other."""

    def __init__(
        self,
        settings: WorkerSettings,
        token: str,
        upstream: Upstream,
        url: str,
        changed: Callable[[], None],
        before: Belief | None = None,
    ) -> None:
        self.settings = settings
        self.token = token
        self.looked = threading.Event()
        """Set once the worker has been looked at."""
        self._upstream = upstream
        self._url = url
        self._changed = changed
        self._lock = threading.Lock()
        self._belief = before or Belief()
        self._stopped = threading.Event()
        self._start = ""
        self._unit_at = float("-inf")
        self._pair = (units.Unit(), units.Unit())
        self._answered_at = time.monotonic()
        self._last_words = ("", "")
        self._thread = threading.Thread(target=self._run, name=f"declared-{settings.name}", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more; the worker itself is systemd's."""
        self._stopped.set()

    @property
    def belief(self) -> Belief:
        """Return what is believed of the worker."""
        with self._lock:
            return self._belief

    def report(self, model: ModelReport | None) -> WorkerReport:
        """Return the worker's report; `model` is what the hive knows of its file."""
        belief, settings = self.belief, self.settings
        health, alive = belief.health, belief.state in ALIVE
        return WorkerReport(
            name=settings.name,
            model=settings.model,
            backend=health.backend if health else settings.backend,
            state=belief.state,
            device=settings.device,
            capabilities=(health.capabilities if health else None) or (model.capabilities if model else []),
            features=health.features if health else [],
            slots=(health.slots if health else 0) or settings.slots or 1,
            context_tokens=(health.context_tokens if health else 0) or settings.context_tokens,
            port=settings.port,
            pid=belief.unit.pid if alive else 0,
            memory_bytes=(health.memory_bytes if health else 0) if alive else 0,
            progress=health.progress if health and alive else 0.0,
            reason=belief.reason,
            since=belief.since,
            started_at=_wall_clock(belief.unit.started_us),
            declared=True,
            pinned=settings.pin,
            access=WorkerAccess(url=self._url, token=self.token) if alive else None,
        )

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._look()
            except Exception:  # one look that fails must not end the watch
                log.exception("worker %s could not be looked at", self.settings.name)
            self.looked.set()
            self._rest()
        self._upstream.close()

    def _rest(self) -> None:
        """Wait for the next look; less when the worker is on the move, or when something happens to it."""
        until = time.monotonic() + (LOOK_S if self._belief.state in MOVING else STEADY_S)
        while not self._stopped.wait(LOOK_S) and time.monotonic() < until:
            if self._has_started_anew() or self._upstream.lost_idle():
                return

    def _has_started_anew(self) -> bool:
        return units.start_of(units.service(self.settings.name)) != self._start

    def _look(self) -> None:
        before, moment = self.belief, time.monotonic()
        quiet = before.state is WorkerState.READY and not self._has_started_anew() and not self._upstream.lost_idle()
        if not quiet or moment - self._unit_at > UNIT_S:
            self._ask_systemd()
        seen = self._ask_worker()
        if seen.health is None and quiet:
            self._ask_systemd()
            seen = replace(seen, unit=self._pair[0], socket=self._pair[1])
        state, reason = judge(self._with_words(seen), before.state)
        self._believe(Belief(state, reason, before.since, seen.unit, seen.health or self._same_life(before, seen)))

    def _same_life(self, before: Belief, seen: Seen) -> WorkerHealth | None:
        """Keep what a worker told of itself while it is silent for a moment."""
        return before.health if seen.unit.pid and seen.unit.pid == before.unit.pid else None

    def _believe(self, now: Belief) -> None:
        before = self.belief
        moved = now.state is not before.state
        if moved:
            now = replace(now, since=time.time())
            log.info("worker %s is %s%s", self.settings.name, now.state, f": {now.reason}" if now.reason else "")
        with self._lock:
            self._belief = now
        if moved or now.reason != before.reason or _told(now) != _told(before):
            self._changed()

    def _ask_systemd(self) -> None:
        service, socket = units.service(self.settings.name), units.listener(self.settings.name)
        start = units.start_of(service)
        try:
            found = units.show((service, socket))
        except RbeeError as problem:
            log.debug("%s: %s", service, problem)
            found = {}
        self._start, self._unit_at = start, time.monotonic()
        self._pair = found.get(service, units.Unit()), found.get(socket, units.Unit())

    def _ask_worker(self) -> Seen:
        unit, socket = self._pair
        seen = Seen(self.settings.name, self.settings.port, unit, socket)
        if unit.load and not unit.runs:
            self._answered_at = time.monotonic()
            return seen  # a connection to its socket would start it
        try:
            answer = self._upstream.request("GET", "/health", timeout_s=HEALTH_LIMIT_S)
            health = self._understood(answer.status, answer.read(65536, HEALTH_LIMIT_S))
        except Refusal as refusal:
            return replace(seen, problem=str(refusal), refused=True)
        except (RbeeError, ValueError) as problem:
            return replace(seen, problem=str(problem), silent_s=time.monotonic() - self._answered_at)
        self._answered_at = time.monotonic()
        return replace(seen, health=health)

    def _understood(self, status: int, body: bytes) -> WorkerHealth:
        """Raises: Refusal when what answers is not this worker."""
        if status == 401:
            raise Refusal(f"the worker at {self._upstream.url} has another token than this hive knows; restart both")
        try:
            health = msgspec.json.decode(body, type=WorkerHealth)
        except msgspec.DecodeError:
            raise Refusal(f"what answers at {self._upstream.url} is no worker") from None
        if health.name != self.settings.name:
            raise Refusal(f"the worker {health.name[:100]!r} answers at {self._upstream.url}")
        return health

    def _with_words(self, seen: Seen) -> Seen:
        """Add what costs a look elsewhere and is needed for failures only."""
        if seen.socket.active == "failed" and not seen.unit.runs:
            return replace(seen, port_taken=not can_bind(self.settings.host, self.settings.port))
        if seen.unit.active == "failed" or seen.unit.sub == "auto-restart":
            return replace(seen, last_words=self._last_words_of(f"{seen.unit.started_us}"))
        return seen

    def _last_words_of(self, life: str) -> str:
        """Return the last line of weight in the journal, read once for each life of the worker."""
        if self._last_words[0] != life:
            try:
                lines = units.journal(units.service(self.settings.name), LAST_WORDS_LINES, own=True).splitlines()
            except RbeeError as problem:
                log.debug("%s", problem)
                lines = []
            said = (line.strip() for line in reversed(lines) if not CHATTER.match(line))
            self._last_words = life, next((line[:300] for line in said if line), "")
        return self._last_words[1]


class Refusal(Exception):
    """Something answers that is not the worker."""


def _told(belief: Belief) -> tuple[object, ...]:
    """What of a belief is worth a report of its own when it changes."""
    health = belief.health
    if health is None:
        return (belief.unit.pid,)
    return (belief.unit.pid, health.progress, health.slots, health.context_tokens, health.capabilities, health.features)


@functools.lru_cache(maxsize=64)  # the same start is the same time in every report, also when the clock is set
def _wall_clock(monotonic_us: int) -> float:
    return time.time() - time.monotonic() + monotonic_us / 1e6 if monotonic_us else 0.0
