"""The workers that the inventory declares on this machine. systemd runs them; the hive watches and reports."""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rbee.errors import InvalidRequest, NotFound, SetupProblem
from rbee.hive import units
from rbee.hive.declared_worker import DeclaredWorker
from rbee.http.upstream import Upstream
from rbee.tokens import read_token
from rbee.wire.fleet import ModelReport, WorkerReport, WorkerState
from rbee.wire.settings import WorkerSettings, read_settings

log = logging.getLogger("rbee.hive")

FOLDER_S = 1.0
EVERYWHERE = ("0.0.0.0", "::", "")
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Where the declared workers' files lie and how this hive and others reach the workers."""

    folder: Path
    tokens: Path
    """A folder with a token file for each worker, or what their names begin with (LoadCredential= of a folder)."""
    dialled_host: str
    authority: ssl.SSLContext | None = None


class Declared:
    """The watched folder of settings, and one watched worker for each file in it."""

    def __init__(self, place: Place | None, changed: Callable[[], None]) -> None:
        self._place = place
        self._changed = changed
        self._lock = threading.Lock()
        self._files: dict[str, tuple[int, ...]] = {}
        self._workers: dict[str, DeclaredWorker] = {}
        self._broken: dict[str, WorkerReport] = {}
        self._stopped = threading.Event()

    def start(self, settle_s: float) -> None:
        """Watch the folder and the workers; wait at most `settle_s` until each has been looked at once."""
        if self._place is None:
            return
        self._read_folder(self._place)
        threading.Thread(target=self._run, args=(self._place,), name="declared", daemon=True).start()
        deadline = time.monotonic() + settle_s
        for worker in self._all().values():
            worker.looked.wait(max(0.0, deadline - time.monotonic()))

    def stop(self) -> None:
        """Watch no more; the workers go on."""
        self._stopped.set()
        for worker in self._all().values():
            worker.stop()

    def reports(self, models: Sequence[ModelReport] = ()) -> list[WorkerReport]:
        """Return every declared worker; one whose settings cannot be read is failed, with the reason."""
        by_name = {model.name: model for model in models}
        with self._lock:
            workers, broken = list(self._workers.values()), list(self._broken.values())
        return [worker.report(by_name.get(worker.settings.model)) for worker in workers] + broken

    def names(self) -> set[str]:
        """Return the names that are taken by the inventory."""
        with self._lock:
            return {*self._workers, *self._broken}

    def ports(self) -> set[int]:
        """Return the ports that are taken by the inventory."""
        return {worker.settings.port for worker in self._all().values()}

    def check_free(self, name: str, port: int) -> None:
        """Raises: InvalidRequest when a worker that is to be started wants what the inventory gave to another."""
        if name in self.names():
            raise InvalidRequest(
                f"The inventory declares a worker {name!r} on this machine", hint="another name", param="name"
            )
        owner = next((one.settings.name for one in self._all().values() if port and one.settings.port == port), None)
        if owner:
            words = f"The inventory gives port {port} of this machine to the worker {owner!r}"
            raise InvalidRequest(words, hint="another port, or none", param="port")

    def refuse_stop(self, name: str) -> None:
        """Raises: InvalidRequest when the worker is not this hive's to stop."""
        if name in self.names():
            raise InvalidRequest(
                f"The inventory declares the worker {name!r}, and systemd keeps it running",
                hint=f"take its Worker line out of the inventory, then: rbee apply; or for now, on its machine: "
                f"systemctl stop {units.service(name)}",
                param="name",
            )

    def log_tail(self, name: str, lines: int) -> str:
        """Return the end of a worker's journal. Raises: NotFound, SetupProblem, TimedOut."""
        if name not in self.names():
            raise NotFound(f"There is no declared worker named {name[:100]!r} here", param="name")
        return units.journal(units.service(name), lines)

    def _all(self) -> dict[str, DeclaredWorker]:
        with self._lock:
            return dict(self._workers)

    def _run(self, place: Place) -> None:
        while not self._stopped.wait(FOLDER_S):
            try:
                self._read_folder(place)
            except Exception:  # one look that fails must not end the watch
                log.exception("%s could not be read", place.folder)

    def _read_folder(self, place: Place) -> None:
        """Take up what is new in the folder, and let go of what is gone."""
        files = _stamps(place)
        before = self._files
        self._files = files
        for name in before.keys() - files.keys():
            self._forget(name)
        for name in sorted(name for name, stamp in files.items() if before.get(name) != stamp):
            self._take_up(place, name)
        if before != files:
            self._changed()

    def _take_up(self, place: Place, name: str) -> None:
        try:
            settings = read_settings(place.folder / f"{name}.yaml", WorkerSettings)
            if settings.name != name:
                raise SetupProblem(f"{place.folder / name}.yaml is named for {name!r} and holds {settings.name!r}")
            token = _token(place.tokens, name)
        except SetupProblem as problem:
            log.error("worker %s: %s", name, problem)
            old = self._forget(name)
            with self._lock:
                self._broken[name] = _broken(name, old, str(problem))
            return
        before = self._forget(name)
        worker = self._watch(place, settings, token, before)
        with self._lock:
            self._workers[name] = worker
        if not self._stopped.is_set():
            worker.start()

    def _watch(
        self, place: Place, settings: WorkerSettings, token: str, before: DeclaredWorker | None
    ) -> DeclaredWorker:
        scheme, tls = ("https", place.authority) if settings.tls else ("http", None)
        everywhere = settings.host in EVERYWHERE
        near = LOOPBACK if everywhere else _bracketed(settings.host)
        far = place.dialled_host if everywhere else _bracketed(settings.host)
        upstream = Upstream(f"{scheme}://{near}:{settings.port}", token=token, connect_timeout_s=2.0, tls=tls)
        url = f"{scheme}://{far}:{settings.port}"
        return DeclaredWorker(settings, token, upstream, url, self._changed, before.belief if before else None)

    def _forget(self, name: str) -> DeclaredWorker | None:
        with self._lock:
            self._broken.pop(name, None)
            worker = self._workers.pop(name, None)
        if worker is not None:
            worker.stop()
        return worker


def _stamps(place: Place) -> dict[str, tuple[int, ...]]:
    """Return the declared workers by name, with what changes when their settings or token are written anew."""
    found: dict[str, tuple[int, ...]] = {}
    try:
        with os.scandir(place.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".yaml") and not entry.name.startswith("."):
                    name = entry.name.removesuffix(".yaml")
                    found[name] = (*_stamp(Path(entry.path)), *_stamp(_token_file(place.tokens, name)))
    except OSError as problem:
        log.debug("%s: %s", place.folder, problem)
    return found


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        status = file.stat()
    except OSError:
        return (0, 0, 0)
    return status.st_mtime_ns, status.st_size, status.st_ino


def _token_file(tokens: Path, name: str) -> Path:
    """Credentials of a folder have its name before theirs (systemd.exec(5), LoadCredential=)."""
    return tokens / name if tokens.is_dir() else tokens.with_name(f"{tokens.name}_{name}")


def _token(tokens: Path, name: str) -> str:
    """Raises: SetupProblem."""
    # systemd hands credentials over at the start only; to restart the hive ends no declared worker.
    hint = "systemctl restart rbee-hive.service"
    return read_token(_token_file(tokens, name), whose=f"the worker {name}", hint=hint)


def _broken(name: str, old: DeclaredWorker | None, reason: str) -> WorkerReport:
    return WorkerReport(
        name=name,
        model=old.settings.model if old else "",
        backend=old.settings.backend if old else "",
        state=WorkerState.FAILED,
        port=old.settings.port if old else 0,
        reason=reason,
        since=time.time(),
        declared=True,
    )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
