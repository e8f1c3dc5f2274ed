"""A hive as a real process, its queen as a small real server, and counts of what is left afterwards."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rbee.client import Client
from rbee.http.server import Request, Response, Routes, Server, reply
from rbee.wire.fleet import HiveReport, ModelReport, SpawnWorker, WorkerReport, WorkerState

TRIAL = Path(__file__).with_name("trial")
ENGINES = {"trial": "Trial", "trial-files": "Files", "trial-pictures": "Pictures", "trial-lame": "Lame"}
HANG_GUARD_S = 60.0


def until(what: Callable[[], Any], describe: str = "", limit_s: float = HANG_GUARD_S) -> Any:
    """Return the first true value of `what`; fail when there is none within the hang guard."""
    deadline = time.monotonic() + limit_s
    while not (value := what()):
        assert time.monotonic() < deadline, f"waited {limit_s:g} s in vain for {describe or what}"
        time.sleep(0.01)
    return value


def alive(pid: int) -> bool:
    """Return True while a process runs; a zombie does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False


def processes_of(home: Path) -> list[int]:
    """Return every process that was started with this RBEE_HOME."""
    mark = f"RBEE_HOME={home}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes() and alive(int(entry.name)):
                    found.append(int(entry.name))
    return found


def install(folder: Path, engines: dict[str, str], module: str = "rbee_trial", version: str = "1.0") -> None:
    """Install the trial plugin into a folder of the path, as pip would: its metadata name the entry points."""
    metadata = folder / "rbee_trial.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rbee-trial\nVersion: {version}\n")
    lines = [f"{name} = {module}:{backend}" for name, backend in engines.items()]
    (metadata / "entry_points.txt").write_text("[rbee.backends]\n" + "\n".join(lines) + "\n")


class RunningHive:
    """A hive process and calls to it."""

    def __init__(
        self, process: subprocess.Popen[str], home: Path, *, token: str = "", tls: ssl.SSLContext | None = None
    ) -> None:
        self.process = process
        self.home = home
        self.first_line = process.stdout.readline().strip() if process.stdout else ""
        self.url = self.first_line.removeprefix("listening on ")
        self.token = token or self._token()
        self.tls = tls
        self.client = Client(self.url, token=self.token, timeout_s=HANG_GUARD_S, tls=tls)

    @property
    def pid(self) -> int:
        return self.process.pid

    def _token(self) -> str:
        with suppress(FileNotFoundError):
            return (self.home / "state" / "hive.token").read_text().strip()
        return ""

    def spawn(self, model: str, backend: str | None = None, **more: Any) -> WorkerReport:
        request = SpawnWorker(model=model, backend=model if backend is None else backend, **more)
        return self.client.post("/v1/workers", request, WorkerReport)

    def workers(self) -> dict[str, WorkerReport]:
        return {worker.name: worker for worker in self.client.get("/v1/workers", list[WorkerReport])}

    def worker(self, name: str, *states: WorkerState) -> WorkerReport:
        """Return a worker once it is in one of these states."""

        def found() -> WorkerReport | None:
            worker = self.workers().get(name)
            return worker if worker and worker.state in states else None

        try:
            worker: WorkerReport = until(found, f"worker {name} to be {states}")
        except AssertionError as problem:
            raise AssertionError(f"{problem}; there are {self.workers()}") from None
        return worker

    def ready(self, model: str, backend: str | None = None, **more: Any) -> WorkerReport:
        name = self.spawn(model, backend, **more).name
        worker = self.worker(name, WorkerState.READY, WorkerState.FAILED)
        assert worker.state is WorkerState.READY, worker.reason
        return worker

    def stop(self, name: str) -> WorkerReport:
        return self.client.delete(f"/v1/workers/{name}", WorkerReport)

    def models(self) -> dict[str, ModelReport]:
        return {model.name: model for model in self.client.get("/v1/models", list[ModelReport])}

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(HANG_GUARD_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(HANG_GUARD_S)

    def left_in_runtime(self) -> list[str]:
        return sorted(path.name for path in (self.home / "state" / "run" / "workers").iterdir())

    def log(self) -> str:
        return (self.home / "hive.log").read_text()


StartHive = Callable[..., RunningHive]


class FakeQueen:
    """A real server that takes what hives tell a queen. `answer` is what it says to a report."""

    def __init__(self, port: int = 0) -> None:
        self.reports: list[HiveReport] = []
        self.ready: list[WorkerReport] = []
        self.tokens: set[str] = set()
        self._closed = False
        self.answer: Callable[[], Response] = lambda: reply({})
        routes = Routes()
        routes.add("POST", "/v1/orchestrator/hive-report", self._report)
        routes.add("POST", "/v1/orchestrator/worker-ready", self._ready)
        self.server = Server("127.0.0.1", port, routes)
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.server.start()

    def _report(self, request: Request) -> Response:
        self._end_with_her()
        self.tokens.add(request.headers.get("authorization", ""))
        answer = self.answer()
        self.reports.append(request.json(HiveReport))
        return answer

    def _ready(self, request: Request) -> Response:
        self._end_with_her()
        self.tokens.add(request.headers.get("authorization", ""))
        self.ready.append(request.json(WorkerReport))
        return reply({})

    def state_of(self, name: str) -> WorkerState | None:
        """Return a worker's state by the last report."""
        workers = self.reports[-1].workers if self.reports else []
        return next((worker.state for worker in workers if worker.name == name), None)

    def _end_with_her(self) -> None:
        """A process that ends takes its kept connections along; the threads of this one stay."""
        if self._closed:
            raise ConnectionResetError("the queen has ended")

    def close(self) -> None:
        self._closed = True
        self.server.shutdown()
        self.server.server_close()


def together(work: Callable[[], Any], times: int) -> list[Any]:
    """Run the same work in several threads at once and return what each returned or raised."""
    barrier = threading.Barrier(times)
    results: list[Any] = []

    def one() -> None:
        barrier.wait()
        try:
            results.append(work())
        except Exception as problem:  # noqa: BLE001  what each thread met is what the test looks at
            results.append(problem)

    threads = [threading.Thread(target=one) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_GUARD_S)
    assert len(results) == times
    return results
