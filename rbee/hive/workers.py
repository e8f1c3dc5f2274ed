"""The workers of this machine and the states they are in."""

from __future__ import annotations

import logging
import os
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from rbee.errors import Busy, NotFound, PortInUse, RbeeError, SetupProblem
from rbee.hive.declared import Declared
from rbee.hive.launch import Child, Launcher
from rbee.hive.ports import can_bind
from rbee.hive.settings import Settings
from rbee.hive.spawning import Spawn, worker_name
from rbee.http.upstream import Upstream
from rbee.process_memory import family_memory_bytes
from rbee.wire.fleet import WorkerAccess, WorkerHealth, WorkerReady, WorkerReport, WorkerSpec, WorkerState

log = logging.getLogger("rbee.hive")

FIRST_PORT, LAST_PORT = 8001, 8999
FAILURES_KEPT = 20
PORTS_TRIED = 5
DRAIN_S = 20.0
"""A worker drains for 10 s and then ends its streams with an error; 10 s more, and it is killed."""
LOADING_GRACE_S = 2.0
"""A worker that loads has no job to lose."""
LAST_WORDS_S = 1.5
KILLED_S = 2.0
PROGRESS_EVERY_S = 0.5
LIVE = (WorkerState.STARTING, WorkerState.READY, WorkerState.DRAINING)


@dataclass
class _Worker:
    """One life of a worker. Changed under `Workers._lock` only."""

    spec: WorkerSpec
    spawn: Spawn
    state: WorkerState = WorkerState.STARTING
    reason: str = ""
    since: float = field(default_factory=time.time)
    started_at: float = field(default_factory=time.time)
    progress: float = 0.0
    ports_lost: int = 0
    needs_port: bool = False
    ready: WorkerReady | None = None
    child: Child | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def holds_its_name(self) -> bool:
        """A worker that failed may still be ending: its socket and port are not free yet."""
        return self.state in LIVE or not self.ended.is_set()

    def move(self, state: WorkerState, reason: str = "") -> None:
        self.state, self.since = state, time.time()
        self.reason = reason or self.reason
        log.info("worker %s is %s%s", self.spec.name, state, f": {self.reason}" if self.reason else "")

    def terminate(self) -> None:
        if self.child is not None and not self.ended.is_set():
            self.child.terminate()

    def kill(self) -> None:
        if self.child is not None and not self.ended.is_set():
            self.child.kill()


class Workers:
    """The table of workers. Every change of state happens here, under one lock.

    | from     | to       | when                                                           | moved by              |
    |----------|----------|----------------------------------------------------------------|-----------------------|
    | (none)   | starting | a spawn is accepted                                            | `spawn`               |
    | starting | ready    | the worker tells that it answers                               | `announce`            |
    | starting | failed   | it tells why it never will                                     | `announce`            |
    | starting | failed   | its process ends                                               | `_ended`              |
    | starting | failed   | it loads longer than its limit                                 | `_watch_load`         |
    | starting | draining | it is stopped while it loads                                   | `stop`, `stop_all`    |
    | ready    | draining | it is stopped                                                  | `stop`, `stop_all`    |
    | ready    | failed   | its process ends and nobody asked for it                       | `_ended`              |
    | draining | stopped  | its process ends; it leaves the table                          | `_ended`              |
    | failed   | stopped  | it is deleted, or its name is taken again; it leaves the table | `stop`, `spawn`       |

    Nothing is started again from here: whether a model deserves a second try is the queen's decision.
    """

    def __init__(
        self,
        launcher: Launcher,
        *,
        settings: Settings,
        authority: ssl.SSLContext | None = None,
        hive_url: Callable[[], str],
        declared: Declared,
        changed: Callable[[], None],
        became_ready: Callable[[str], None],
    ) -> None:
        self._launcher = launcher
        self._settings = settings
        self._host = settings.host
        self._authority = authority
        self._hive_url = hive_url
        self._declared = declared
        self._load_limit_s = settings.load_limit_s
        self._changed = changed
        self._became_ready = became_ready
        self._lock = threading.Lock()
        self._workers: dict[str, _Worker] = {}
        self._closing = False

    def reports(self) -> list[WorkerReport]:
        """Return every worker that runs, and those that failed last."""
        with self._lock:
            return [self._report(worker) for worker in self._workers.values()]

    def report(self, name: str) -> WorkerReport:
        """Return one worker. Raises: NotFound."""
        with self._lock:
            return self._report(self._find(name))

    def spawn(self, spawn: Spawn) -> WorkerReport:
        """Accept a new worker; the launcher's thread starts it. Raises: InvalidRequest, PortInUse, Busy."""
        self._declared.check_free(spawn.request.name, spawn.request.port)
        with self._moving():
            if self._closing:
                raise Busy("This hive is stopping", retry_after_s=5)
            live = {name: worker for name, worker in self._workers.items() if worker.holds_its_name()}
            name = worker_name(spawn.request.name, spawn.model.name, {*live, *self._declared.names()})
            port = self._free_port(spawn.request.port, {worker.spec.port for worker in live.values()})
            worker = _Worker(self._spec(spawn, name, port), spawn)
            self._workers.pop(name, None)
            self._workers[name] = worker
            log.info("worker %s is starting: %s with %s on port %d", name, spawn.model.name, spawn.engine.name, port)
            report = self._report(worker)
        self._launcher.submit(lambda: self._launch(worker))
        return report

    def announce(self, ready: WorkerReady, authorize: Callable[[str], None]) -> WorkerReport:
        """Take a worker's word that it answers, or why it never will. Raises: NotFound, AccessDenied."""
        with self._moving():
            worker = self._find(ready.name)
            authorize(worker.spec.token)
            became_ready = False
            if worker.state is WorkerState.STARTING:
                self._launcher.forget_spec(ready.name)
                if ready.state is WorkerState.READY:
                    worker.ready, worker.progress, became_ready = ready, 1.0, True
                    worker.move(WorkerState.READY)
                elif ready.state is WorkerState.FAILED and self._was_beaten_to_its_port(worker, ready):
                    worker.ports_lost += 1
                    worker.needs_port = True
                elif ready.state is WorkerState.FAILED:
                    worker.move(WorkerState.FAILED, ready.reason or "the worker gave no reason")
                    self._end_in_background(worker, LOADING_GRACE_S)
            report = self._report(worker)
        if became_ready:
            self._became_ready(ready.name)
        return report

    def stop(self, name: str, wait_s: float) -> WorkerReport:
        """Drain and end a worker, or forget one that failed; return how it stands after `wait_s` at most.

        Raises: NotFound.
        """
        with self._moving():
            worker = self._find(name)
            if worker.state is WorkerState.FAILED:
                worker.move(WorkerState.STOPPED)
                del self._workers[name]
            else:
                self._drain(worker, DRAIN_S)
        if worker.state is WorkerState.DRAINING:
            worker.ended.wait(wait_s)
        with self._lock:
            return self._report(worker)

    def stop_all(self, limit_s: float, hurry: threading.Event) -> None:
        """Drain every worker and take no new one; after `limit_s`, or at once when `hurry` is set, they are killed."""
        with self._moving():
            self._closing = True
            for worker in self._workers.values():
                if worker.state is not WorkerState.FAILED:
                    self._drain(worker, limit_s)
            running = [w for w in self._workers.values() if w.child is not None and not w.ended.is_set()]
        last_words_s = min(LAST_WORDS_S, limit_s / 3)
        _await_ends(running, limit_s - last_words_s, hurry)
        for worker in running:
            # A second SIGTERM asks a draining worker to end its streams with an error while there is time for one.
            worker.terminate()
        _await_ends(running, last_words_s, hurry)
        for worker in running:
            worker.kill()
        _await_ends(running, KILLED_S, threading.Event())

    def log_tail(self, name: str, lines: int) -> str:
        """Return the end of a worker's log. Raises: NotFound."""
        with self._lock:
            self._find(name)
        try:
            with open(self._launcher.log_path(name), "rb") as file:
                file.seek(max(0, file.seek(0, 2) - lines * 400))
                text = file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        return "".join(text.splitlines(keepends=True)[-lines:])

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Hold the lock, and tell that something changed once it is free."""
        with self._lock:
            yield
        self._changed()

    def _find(self, name: str) -> _Worker:
        if name not in self._workers:
            known = ", ".join(self._workers) or "none"
            raise NotFound(f"There is no worker named {name[:100]!r} here. Workers: {known}", param="name")
        return self._workers[name]

    def _free_port(self, wanted: int, taken: set[int]) -> int:
        if wanted:
            if wanted in taken or not can_bind(self._host, wanted):
                raise PortInUse(self._host, wanted)
            return wanted
        taken = taken | self._declared.ports()
        for port in range(FIRST_PORT, LAST_PORT + 1):
            if port not in taken and can_bind(self._host, port):
                return port
        raise SetupProblem(f"No port from {FIRST_PORT} to {LAST_PORT} is free on {self._host}")

    def _spec(self, spawn: Spawn, name: str, port: int) -> WorkerSpec:
        request, tls = spawn.request, self._settings.tls
        return WorkerSpec(
            name=name,
            backend=spawn.engine.name,
            model=spawn.model.name,
            path=spawn.model.path,
            format=spawn.model.format,
            capabilities=spawn.capabilities,
            host=self._host,
            port=port,
            token=secrets.token_urlsafe(32),
            engine_socket=self._launcher.socket_path(name),
            hive_url=self._hive_url(),
            device=request.device,
            gpus=request.gpus,
            context_tokens=request.context_tokens,
            slots=request.slots,
            threads=request.threads,
            options=request.options,
            parent_pid=os.getpid(),
            certificate=tls.certificate if tls else "",
            key=tls.key if tls else "",
            authority=tls.authority if tls else "",
        )

    def _launch(self, worker: _Worker) -> None:
        """Start the process; runs in the launcher's thread."""
        with self._lock:
            wanted = worker.state is WorkerState.STARTING
        if not wanted:  # stopped before it was its turn
            self._ended(worker, "stopped before it started")
            return
        try:
            child = self._launcher.start(worker.spec)
        except OSError as problem:
            self._ended(worker, f"the worker process cannot be started: {problem}")
            return
        with self._moving():
            worker.child = child
            if worker.state is WorkerState.DRAINING:
                child.terminate()
        name = worker.spec.name
        threading.Thread(target=self._watch_exit, args=(worker, child), name=f"exit-{name}", daemon=True).start()
        threading.Thread(target=self._watch_load, args=(worker, child), name=f"load-{name}", daemon=True).start()

    def _watch_exit(self, worker: _Worker, child: Child) -> None:
        self._ended(worker, child.wait())

    def _watch_load(self, worker: _Worker, child: Child) -> None:
        """Follow the load's progress, and end one that takes longer than its limit."""

        def loads() -> bool:
            return worker.state is WorkerState.STARTING and worker.child is child

        url = f"{self._settings.scheme}://{self._settings.near_host}:{worker.spec.port}"
        upstream = Upstream(url, connect_timeout_s=1.0, tls=self._authority)
        deadline = time.monotonic() + self._load_limit_s
        while not worker.ended.wait(PROGRESS_EVERY_S) and loads():
            progress = _progress(upstream, worker.spec.name)
            with self._lock:
                moved = loads() and progress > worker.progress
                worker.progress = progress if moved else worker.progress
            if moved:
                self._changed()
            if time.monotonic() > deadline:
                with self._moving():
                    if loads():
                        worker.move(WorkerState.FAILED, f"the model was not loaded within {self._load_limit_s:g} s")
                        self._end_in_background(worker, LOADING_GRACE_S)
        upstream.close()

    def _drain(self, worker: _Worker, grace_s: float) -> None:
        """Move a live worker to draining and see to its end; the lock is held."""
        if worker.state is WorkerState.DRAINING:
            return
        loading = worker.state is WorkerState.STARTING
        worker.move(WorkerState.DRAINING)
        self._end_in_background(worker, LOADING_GRACE_S if loading else grace_s)

    def _end_in_background(self, worker: _Worker, grace_s: float) -> None:
        threading.Thread(target=_end, args=(worker, grace_s), name=f"end-{worker.spec.name}", daemon=True).start()

    def _ended(self, worker: _Worker, how: str) -> None:
        """Take note that a worker's process is gone."""
        if self._starts_on_another_port(worker):
            return
        name = worker.spec.name
        with self._moving():
            superseded = self._workers.get(name, worker) is not worker
            if worker.state is WorkerState.DRAINING:
                worker.move(WorkerState.STOPPED)
                self._workers.pop(name, None)
            elif worker.state is not WorkerState.FAILED:
                last_words = ""
                if worker.state is WorkerState.STARTING and worker.child is not None:
                    last_words = worker.child.last_words()
                worker.move(WorkerState.FAILED, f"{last_words} ({how})" if last_words else how)
            if not superseded:
                self._launcher.clear(name)
            worker.ended.set()
            failed = [name for name, other in self._workers.items() if other.state is WorkerState.FAILED]
            for oldest in failed[:-FAILURES_KEPT]:
                del self._workers[oldest]

    def _was_beaten_to_its_port(self, worker: _Worker, ready: WorkerReady) -> bool:
        """Another program may take a free port between the moment it is chosen and the worker's bind."""
        chosen_here = not worker.spawn.request.port and worker.ports_lost < PORTS_TRIED
        return chosen_here and ready.reason == str(PortInUse(worker.spec.host, worker.spec.port))

    def _starts_on_another_port(self, worker: _Worker) -> bool:
        with self._moving():
            if not worker.needs_port or worker.state is not WorkerState.STARTING:
                return False
            taken = {other.spec.port for other in self._workers.values() if other is not worker}
            worker.needs_port, worker.child = False, None
            try:
                port = self._free_port(0, taken)
            except SetupProblem:
                return False
            log.info("worker %s lost port %d to another program and takes %d", worker.spec.name, worker.spec.port, port)
            worker.spec = msgspec.structs.replace(worker.spec, port=port)
        self._launcher.submit(lambda: self._launch(worker))
        return True

    def _report(self, worker: _Worker) -> WorkerReport:
        spec, ready = worker.spec, worker.ready
        url = f"{self._settings.scheme}://{self._settings.dialled_host}:{spec.port}"
        alive = worker.state in LIVE
        # A quick worker is ready before its starter has noted which process it is.
        known = worker.child.pid if worker.child else ready.pid if ready else 0
        pid = known if alive else 0
        access = WorkerAccess(url=url, engine_url=ready.engine_url if ready else "", token=spec.token)
        return WorkerReport(
            name=spec.name,
            model=spec.model,
            backend=spec.backend,
            state=worker.state,
            device=spec.device,
            capabilities=(ready.capabilities if ready else None) or spec.capabilities,
            features=ready.features if ready else worker.spawn.engine.features,
            slots=ready.slots if ready else spec.slots or 1,
            context_tokens=ready.context_tokens if ready else spec.context_tokens,
            port=spec.port,
            pid=pid,
            memory_bytes=family_memory_bytes(pid) if pid else 0,
            progress=worker.progress,
            reason=worker.reason,
            since=worker.since,
            started_at=worker.started_at,
            access=access if alive else None,
        )


def _end(worker: _Worker, grace_s: float) -> None:
    """SIGTERM, and SIGKILL after the grace; a worker that is not started yet is ended by whoever starts it."""
    worker.terminate()
    if not worker.ended.wait(grace_s):
        worker.kill()


def _await_ends(workers: Sequence[_Worker], limit_s: float, hurry: threading.Event) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and not all(worker.ended.is_set() for worker in workers):
        if hurry.wait(0.02):
            return


def _progress(upstream: Upstream, name: str) -> float:
    """Ask a loading worker how far it is; it answers 503 with its health until it is ready."""
    try:
        body = upstream.request("GET", "/health", timeout_s=1.0).read(65536, 1.0)
        health = msgspec.json.decode(body, type=WorkerHealth)
    except (RbeeError, ValueError, msgspec.DecodeError):
        return 0.0
    return health.progress if health.name == name else 0.0
