"""The runner: it owns the backend's life and counts the jobs that pass through it."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from rbee import formats
from rbee.errors import Busy, LoadFailed, RbeeError
from rbee.http.upstream import Upstream
from rbee.paths import private, runtime_dir
from rbee.plugin import Backend, Capability, Endpoint, Loaded, ModelSpec, ServingBackend
from rbee.process_memory import family_memory_bytes
from rbee.wire.fleet import WorkerHealth, WorkerReady, WorkerSpec, WorkerState
from rbee.worker.context import USUAL_SLOTS, default_context, machine_memory_bytes
from rbee.worker.metrics import Metrics

log = logging.getLogger("rbee.worker")

WATCH_S = 0.2
ERRORS_TOLD_S = 1.0
"""How long a worker that ends waits until its clients have been told."""
MAX_SOCKET_PATH_BYTES = 100
"""A Unix socket's path must fit `sun_path` (unix(7): 108 bytes on Linux, 104 on macOS)."""


class Runner:
    """One backend with one model, from its load to its end."""

    def __init__(self, spec: WorkerSpec, backend: Backend) -> None:
        self.spec = spec
        self.backend = backend
        self.metrics = Metrics(spec.model, spec.backend)
        self.status = "loading"
        self.progress = 0.0
        self.reason = ""
        self.loaded = Loaded(slots=0)
        self.known: frozenset[Capability] = frozenset()
        self.upstream: Upstream | None = None
        self.over = threading.Event()
        """Set when the process should end: it was told to, the load failed, or the engine died."""
        self.ending_fd, self._ending_writer = os.pipe()
        self._in_flight = 0
        self._moves = 0
        self._idle = threading.Condition()
        self._lock = threading.Lock()
        self._closed = False
        self._loading = True

    def live(self, on_change: Callable[[], None]) -> None:
        """Load the model and watch over the engine until the worker ends; `on_change` hears of every state.

        | from             | on                           | to       |
        |------------------|------------------------------|----------|
        | loading          | the backend has loaded       | ready    |
        | loading          | the backend raises           | failed   |
        | ready            | a drain request, a signal    | draining |
        | ready, draining  | the engine has died          | failed   |
        | loading          | a drain request, a signal    | draining |

        draining and failed are final. Run it in a thread that lives as long as the engine: a serving backend may tie
        its child process to this thread (prctl(2), PR_SET_PDEATHSIG), and signals are for the main thread.
        """
        started = time.monotonic()
        try:
            self.loaded = self._load()
        except Exception as problem:  # noqa: BLE001  a backend may raise anything to refuse
            self._fail(_reason(problem), on_change)
            return
        finally:
            self._loading = False
        self.metrics.load_s = time.monotonic() - started
        self.progress = 1.0
        if self._move("ready", ("loading",)):
            log.info("ready after %.2f s", self.metrics.load_s)
            on_change()
        while not self.over.wait(WATCH_S):
            if isinstance(self.backend, ServingBackend) and not self.backend.alive():
                self._fail("the engine died; the lines above in this log are its last words", on_change)
                return

    @property
    def capabilities(self) -> frozenset[str]:
        """What this worker can do with its model: the engine's word, then the file's, then the class's."""
        found = self.loaded.capabilities or self.known & self.backend.capabilities or self.backend.capabilities
        return frozenset(map(str, found))

    @property
    def features(self) -> frozenset[str]:
        """What the engine offers beyond the plain form."""
        found = self.loaded.features
        return frozenset(map(str, self.backend.features if found is None else found))

    @property
    def in_flight(self) -> int:
        """The number of jobs being answered."""
        return self._in_flight

    def health(self) -> WorkerHealth:
        """Return the body of `/health`."""
        return WorkerHealth(
            status=self.status,
            name=self.spec.name,
            model=self.spec.model,
            backend=self.spec.backend,
            in_flight=self._in_flight,
            slots=self.loaded.slots,
            context_tokens=self.loaded.context_tokens or 0,
            progress=round(self.progress, 3),
            reason=self.reason,
            memory_bytes=family_memory_bytes(os.getpid()),
            capabilities=sorted(self.capabilities),
            features=sorted(self.features),
        )

    def moves(self) -> tuple[int, int]:
        """Return the number of jobs in flight, and a number that grows with each step that any job makes."""
        with self._idle:
            return self._in_flight, self._moves

    def moved(self) -> None:
        """Take note that a job has made a step."""
        self._moves += 1  # a step lost between two threads is as good as one step

    def announcement(self, port: int) -> WorkerReady:
        """Return what the hive is told."""
        return WorkerReady(
            name=self.spec.name,
            pid=os.getpid(),
            port=port,
            state=WorkerState.FAILED if self.status == "failed" else WorkerState(self.status),
            engine_url=self.upstream.url if self.upstream else "",
            capabilities=sorted(self.capabilities),
            features=sorted(self.features),
            slots=max(1, self.loaded.slots),
            context_tokens=self.loaded.context_tokens or 0,
            reason=self.reason,
        )

    def check_ready(self) -> None:
        """Raises: Busy while the worker is not ready to take jobs."""
        if self.status == "ready":
            return
        words = {"loading": "is loading its model", "draining": "is shutting down"}
        what = words.get(self.status, f"has failed: {self.reason}")
        raise Busy(f"The worker {self.spec.name} {what}", retry_after_s=1.0 if self.status == "loading" else 5.0)

    def enter(self) -> None:
        """Count a job in. Raises: Busy."""
        with self._idle:
            self.check_ready()
            self._in_flight += 1
            self._moves += 1

    def leave(self) -> None:
        """Count a job out."""
        with self._idle:
            self._in_flight -= 1
            self._moves += 1
            self._idle.notify_all()

    def drain(self) -> None:
        """Take no new jobs; those in flight go on."""
        if self._move("draining", ("loading", "ready")):
            log.info("draining, %d jobs in flight", self._in_flight)

    def end(self, patience_s: float) -> None:
        """Drain, give jobs `patience_s` to finish, end the others with an error, and close the backend."""
        self.drain()
        self._wait_idle(patience_s, unless_cut=True)
        self.cut()
        self._wait_idle(ERRORS_TOLD_S)
        self._close()

    def cut(self) -> None:
        """End the jobs in flight with an error, now."""
        with self._idle:
            self.over.set()
            self._idle.notify_all()
        os.write(self._ending_writer, b"x")

    def ending(self) -> bool:
        """Return True when jobs must end at once."""
        return self.over.is_set()

    def _load(self) -> Loaded:
        path = Path(self.spec.path) if self.spec.path else None
        file = formats.inspect(path, model_type=self.spec.options.get("model_type", "")) if path else None
        self.known = _capabilities(self.spec.capabilities) or _capabilities(file.capabilities if file else ())
        spec = ModelSpec(
            name=self.spec.model,
            path=path,
            format=file.format if file else None,
            capabilities=self.known,
            context_tokens=self.spec.context_tokens or (_default_context(file, self.spec.slots) if file else 0),
            slots=self.spec.slots,
            threads=self.spec.threads,
            device=self.spec.device,
            gpus=tuple(self.spec.gpus),
            options=self.spec.options,
        )
        _check_fit(spec, self.backend)
        if isinstance(self.backend, ServingBackend):
            endpoint = _endpoint(self.spec)
            loaded = self.backend.load(spec, endpoint, self._progress)
            self.upstream = Upstream(endpoint.url, token=endpoint.token)
            return loaded
        return self.backend.load(spec, self._progress)  # type: ignore[attr-defined, no-any-return]  # the other shape

    def _progress(self, part: float) -> None:
        self.progress = max(self.progress, min(0.99, part))

    def _move(self, to: str, sources: tuple[str, ...]) -> bool:
        with self._lock:
            if self.status not in sources:
                return False
            self.status = to
            return True

    def _fail(self, reason: str, on_change: Callable[[], None]) -> None:
        was_told_to_end = self.over.is_set() or self.status == "draining"
        self.reason = reason
        if self._move("failed", ("loading", "ready", "draining")) and not was_told_to_end:
            log.error("%s with model %s failed: %s", self.spec.backend, self.spec.model, reason)
            on_change()
        self.over.set()

    def _wait_idle(self, patience_s: float, *, unless_cut: bool = False) -> None:
        with self._idle:
            self._idle.wait_for(lambda: self._in_flight == 0 or (unless_cut and self.over.is_set()), patience_s)

    def _close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._loading and not isinstance(self.backend, ServingBackend):
            return  # a library cannot be freed while it loads; the end of the process does it
        try:
            self.backend.close()
        except Exception:
            log.exception("closing %s failed", self.spec.backend)
        if self.upstream:
            self.upstream.close()
            Path(self.upstream.url.removeprefix("unix:")).unlink(missing_ok=True)


def _default_context(file: formats.ModelFile, slots: int) -> int:
    bytes_per_token = 2 * file.kv_elements_per_token  # f16, what engines keep unless told otherwise
    return default_context(file.context_tokens, bytes_per_token, slots or USUAL_SLOTS, machine_memory_bytes())


def _capabilities(names: Iterable[str]) -> frozenset[Capability]:
    known = {str(one): one for one in Capability}
    return frozenset(known[name] for name in names if name in known)


def _check_fit(spec: ModelSpec, backend: Backend) -> None:
    if spec.path is None and backend.formats:
        raise LoadFailed(f"{backend.name} needs a model file", hint="--model FILE")
    if spec.format and backend.formats and spec.format not in backend.formats:
        raise LoadFailed(f"{backend.name} cannot load {spec.format}; it loads: {', '.join(sorted(backend.formats))}")
    unknown = sorted(set(spec.options) - set(backend.options))
    if unknown:
        known = ", ".join(sorted(backend.options)) or "none"
        raise LoadFailed(f"{backend.name} has no option {', '.join(unknown)}; it has: {known}")
    if spec.device not in backend.devices:
        raise LoadFailed(f"{backend.name} cannot use {spec.device}; it can use: {', '.join(sorted(backend.devices))}")


def _endpoint(spec: WorkerSpec) -> Endpoint:
    """Choose where the engine listens: a Unix socket when its path is short enough, else a free loopback port."""
    token = spec.token or secrets.token_urlsafe(32)
    path = Path(spec.engine_socket) if spec.engine_socket else runtime_dir() / f"engine-{os.getpid()}.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        private(path.parent)
        path.unlink(missing_ok=True)
        return Endpoint(f"unix:{path}", token)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Endpoint(f"http://127.0.0.1:{probe.getsockname()[1]}", token)


def _reason(problem: Exception) -> str:
    if isinstance(problem, RbeeError):
        return str(problem)
    text = " ".join(str(problem).split())[:1000]
    plain = isinstance(problem, (OSError, RuntimeError, ValueError)) and text
    return text if plain else f"{type(problem).__name__}: {text}"
