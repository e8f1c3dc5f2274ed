"""A hive with one worker on another machine, as a process of its own that a test may stop, kill and start again.

It speaks TLS and the hive's side of what the queen asks, and its worker says words back. `python -m rbee.testing.fleet`
is that process; `running_hive` starts it.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from rbee.client import Client
from rbee.http.server import Request, Response, Routes, Server, reply
from rbee.http.tls import client_context, server_context
from rbee.wire.fleet import EngineReport, HiveReport, ModelReport, WorkerAccess, WorkerReport, WorkerState

WORKER = "says"
CAN = ["chat"]


@dataclass
class RunningHive:
    """A running fake: `port` of hive and worker."""

    process: subprocess.Popen[str]
    port: int
    client: Client

    def change(self, **fields: Any) -> None:
        """Replace fields of the report, which makes it a newer one."""
        self.client.post("/control", fields, dict[str, Any])


@contextlib.contextmanager
def running_hive(
    name: str, token: str, credentials: Path, *, port: int = 0, model: str = "honey", word_s: float = 0.0
) -> Iterator[RunningHive]:
    """Start a hive whose one worker has `model` and says a word every `word_s` seconds; end it afterwards.

    `credentials` holds `host.crt`, `host.key` and `ca.crt`, the authority that signed them.
    """
    words = ["--name", name, "--token", token, "--port", port, "--model", model, "--word-s", word_s]
    words += ["--certificate", credentials / "host.crt", "--key", credentials / "host.key"]
    command = [sys.executable, "-m", "rbee.testing.fleet", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, f"the fake hive {name} did not start"
        url = f"https://127.0.0.1:{int(line)}"
        with contextlib.closing(Client(url, token=token, tls=client_context(credentials / "ca.crt"))) as client:
            yield RunningHive(process, int(line), client)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@dataclass
class _Fake:
    """What the process holds: its report, and a condition that wakes those who wait for a newer one."""

    token: str
    word_s: float
    report: HiveReport
    changed: threading.Condition = field(default_factory=threading.Condition)

    def hive(self, request: Request) -> Response:
        request.require(self.token)
        return reply(self.report)

    def watch(self, request: Request) -> Response:
        request.require(self.token)
        epoch, _, sequence = request.query["after"][0].partition(":")
        known = (float(epoch), int(sequence))
        with self.changed:
            self.changed.wait_for(lambda: self._order() > known, float(request.query["wait"][0]))
            return reply(self.report)

    def control(self, request: Request) -> Response:
        request.require(self.token)
        fields = msgspec.to_builtins(self.report) | request.json(dict[str, Any])
        with self.changed:
            fields["sequence"] = self.report.sequence + 1
            self.report = msgspec.convert(fields, HiveReport)
            self.changed.notify_all()
        return reply({})

    def chat(self, request: Request) -> Response:
        request.require(self.token)
        asked = request.json(dict[str, Any])
        words = asked["messages"][-1]["content"].split()
        if asked.get("stream"):
            return Response(self._events(words), content_type="text/event-stream")
        return reply({"choices": [{"index": 0, "message": {"role": "assistant", "content": " ".join(words)}}]})

    def _events(self, words: list[str]) -> Iterator[bytes]:
        for word in words:
            chunk = {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
            yield b"data: " + msgspec.json.encode(chunk) + b"\n\n"
            time.sleep(self.word_s)
        yield b"data: [DONE]\n\n"

    def _order(self) -> tuple[float, int]:
        return self.report.epoch, self.report.sequence


def _report(name: str, model: str, port: int, token: str) -> HiveReport:
    # As a hive knows itself: not by the name under which others reach it.
    url = f"http://0.0.0.0:{port}"
    worker = WorkerReport(
        name=WORKER,
        model=model,
        backend="fake",
        state=WorkerState.READY,
        capabilities=CAN,
        slots=8,
        port=port,
        access=WorkerAccess(url=url, engine_url="unix:/nowhere", token=token),
    )
    return HiveReport(
        hive=name,
        url=url,
        version="0",
        epoch=time.time(),
        sequence=1,
        engines=[EngineReport(name="fake", capabilities=CAN, formats=["gguf"])],
        models=[ModelReport(name=model, format="gguf", capabilities=CAN)],
        workers=[worker],
    )


def main() -> None:
    """Serve until it is killed; the first line of the output is the port."""
    parser = argparse.ArgumentParser()
    for option in ("--name", "--token", "--model"):
        parser.add_argument(option, required=True)
    for option in ("--certificate", "--key"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--word-s", type=float, default=0.0)
    told = parser.parse_args()
    routes = Routes()
    server = Server("0.0.0.0", told.port, routes, tls=server_context(told.certificate, told.key))
    fake = _Fake(told.token, told.word_s, _report(told.name, told.model, server.port, told.token))
    routes.add("GET", "/health", lambda request: reply({"status": "ready"}))
    routes.add("GET", "/v1/hive", fake.hive)
    routes.add("GET", "/v1/hive/watch", fake.watch)
    routes.add("POST", "/control", fake.control)
    routes.add("POST", "/v1/chat/completions", fake.chat)
    print(server.port, flush=True)
    server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
