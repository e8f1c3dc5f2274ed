"""Start a real worker process for a test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from rbee.client import Client, events
from rbee.errors import RbeeError
from rbee.http.upstream import Answer, Upstream
from rbee.wire.fleet import WorkerHealth, WorkerSpec

START_S = 120.0
END_S = 30.0
ANSWER_S = 120.0


@dataclass
class RunningWorker:
    """A worker process. `token` is that of its spec; `log` is its output so far."""

    process: subprocess.Popen[bytes]
    spec: WorkerSpec
    log_file: Path
    url: str = ""
    _kept: dict[str, Upstream] = field(default_factory=dict)
    _clients: list[Client] = field(default_factory=list)

    @property
    def log(self) -> str:
        """Return what the worker has printed."""
        return self.log_file.read_text(errors="replace")

    @property
    def client(self) -> Client:
        """Return a client with the worker's token; it is closed with the worker."""
        self._clients = self._clients or [Client(self.url, token=self.spec.token, timeout_s=ANSWER_S)]
        return self._clients[0]

    def health(self) -> WorkerHealth:
        """Return the worker's health, ready or not."""
        answer = self.send("/health", b"", method="GET", token="")
        return msgspec.json.decode(answer.read(), type=WorkerHealth)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST JSON and return the answer's. Raises: RbeeError with the answer's status."""
        return self.client.post(path, body, dict[str, Any])

    def send(self, path: str, body: bytes, *, method: str = "POST", token: str | None = None) -> Answer:
        """Send raw bytes and return the answer's head, whatever its status."""
        given = self.spec.token if token is None else token
        if given not in self._kept:
            self._kept[given] = Upstream(self.url, token=given)
        return self._kept[given].request(method, path, body, timeout_s=ANSWER_S)

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """POST with `stream` and yield the events' JSON; `[DONE]` comes as {"done": "[DONE]"}."""
        answer = self.client.send("POST", path, {**body, "stream": True})
        for data in events(answer, silence_s=ANSWER_S):
            yield {"done": data} if data == "[DONE]" else json.loads(data)

    def chat(self, content: str, **fields: Any) -> dict[str, Any]:
        """Ask one question and return the whole answer."""
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", {"model": self.spec.model, "messages": messages, **fields})

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the worker."""
        self.process.send_signal(number)

    def children(self) -> list[int]:
        """Return the process ids of the worker's children: its engine, its template renderer."""
        found: list[int] = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # a connection's thread may end meanwhile
                found += map(int, (task / "children").read_text().split())
        return found

    def close(self) -> None:
        """Close the connections to the worker."""
        for upstream in self._kept.values():
            upstream.close()
        for client in self._clients:
            client.close()

    def wait(self) -> int:
        """Wait until the worker ends and return its exit code."""
        return self.process.wait(END_S)


@contextlib.contextmanager
def started_worker(spec: WorkerSpec, *, env: Mapping[str, str] = {}) -> Iterator[RunningWorker]:
    """Start `python -m rbee.worker run --spec …` and do not wait for it; end it at last.

    `spec.port` 0 takes any free port; the worker's own announcement of it is read from its log.
    """
    with tempfile.TemporaryDirectory(prefix="rbee-worker-") as name:
        folder = Path(name)
        file, log_file = folder / "spec.json", folder / "log"
        whole = msgspec.structs.replace(spec, token=spec.token or "test-token")
        file.touch(mode=0o600)
        file.write_bytes(msgspec.json.encode(whole))
        environment = {"RBEE_HOME": name, **os.environ, **env}
        with log_file.open("wb") as log:
            command = [sys.executable, "-m", "rbee.worker", "run", "--spec", str(file)]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        worker = RunningWorker(process, whole, log_file)
        try:
            _find_port(worker)
            yield worker
        finally:
            worker.close()
            _end(process)


@contextlib.contextmanager
def run_worker(spec: WorkerSpec, *, env: Mapping[str, str] = {}) -> Iterator[RunningWorker]:
    """Start a worker and wait until it is ready. Raises: RuntimeError with its log."""
    with started_worker(spec, env=env) as worker:
        deadline = time.monotonic() + START_S
        while worker.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(RbeeError):
                if worker.health().status == "ready":
                    break
            time.sleep(0.02)
        else:
            raise RuntimeError(f"the worker did not become ready:\n{worker.log}")
        yield worker


def _find_port(worker: RunningWorker) -> None:
    """Wait for the line that names the port; a worker that ended before it has no address."""
    deadline = time.monotonic() + START_S
    marker = " listens on "
    while time.monotonic() < deadline:
        line = next((line for line in worker.log.splitlines() if marker in line), "")
        if line:
            worker.url = "http://" + line.split(marker)[1].split(",")[0]
            return
        if worker.process.poll() is not None:
            return
        time.sleep(0.01)
    raise RuntimeError(f"the worker did not start to listen:\n{worker.log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
