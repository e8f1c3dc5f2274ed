"""The clients of one measurement: wrk for whole answers, clients.c for the time of each token."""

from __future__ import annotations

import http.client
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bench.gateway.contenders import HERE, MODEL, Contender

PATH = "/v1/chat/completions"
WHOLE_END, STREAM_END = "}", r"data: [DONE]\n\n"
LIMIT_S = 60
REST_S, REST_SHARE, REST_LIMIT_S = 0.4, 0.1, 30.0
PROMPT = (
    "Bees gather nectar from flowers and carry it home. How far do they fly for it, and how do they find the way back?"
)


class Throughput(msgspec.Struct, frozen=True):
    """What wrk counted. `problem` says why the last lost answer was not whole; times are of answers to their end."""

    seconds: float
    whole: int
    lost: int
    problem: str
    p50_ms: float
    p99_ms: float


class Times(msgspec.Struct, frozen=True):
    """Percentiles of some times in ms."""

    count: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


class Streams(msgspec.Struct, frozen=True):
    """What clients.c noted. `gap` is between two tokens of one stream; `cpu_s` is what the clients themselves took."""

    seconds: float
    cpu_s: float
    whole: int
    lost: int
    tokens: int
    connects: int
    problem: str
    first_token: Times
    gap: Times


@dataclass(frozen=True)
class Clients:
    """Sends loads of requests. `folder` holds files for the programs, `program` is clients.c compiled."""

    folder: Path
    program: Path
    tokens: int = 64
    lengths: dict[tuple[str, bool], int] = field(default_factory=dict)
    """How many bytes a whole answer has, by contender and whether it is a stream."""

    def learn(self, contender: Contender) -> None:
        """Ask once for each kind of answer. Raises: RuntimeError when one is not whole."""
        for stream in (False, True):
            self.lengths[contender.name, stream] = len(whole_answer(contender, stream=stream, tokens=self.tokens))

    def throughput(self, contender: Contender, *, stream: bool, clients: int, seconds: int) -> tuple[Throughput, float]:
        """Ask for whole answers on so many connections. Returns what came, and the CPU seconds that wrk took."""
        (self.folder / "request").write_bytes(body(stream))
        headers = {"Content-Type": "application/json", **contender.headers}
        (self.folder / "headers").write_text("".join(f"{name}: {value}\n" for name, value in headers.items()))
        length = self.lengths[contender.name, stream]
        command = f"wrk --threads 1 --connections {clients} --duration {seconds}s --timeout {LIMIT_S}s"
        command += f" --script {HERE / 'answers.lua'} http://127.0.0.1:{contender.port}{PATH} -- {length}"
        files = {"REQUEST": str(self.folder / "request"), "HEADERS": str(self.folder / "headers")}
        before_s = children_cpu_s()
        done = run([*command.split(), STREAM_END if stream else WHOLE_END], env=files)
        cpu_s = children_cpu_s() - before_s
        return msgspec.json.decode(done.splitlines()[-1], type=Throughput), cpu_s

    def streams(self, contender: Contender, *, clients: int, seconds: int, once: bool = False) -> Streams:
        """Read streams on so many connections, noting each token's time; `once`: one stream each."""
        data = body(stream=True)
        lines = [f"POST {PATH} HTTP/1.1", f"Host: 127.0.0.1:{contender.port}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in contender.headers.items()]
        request = "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data
        command = f"{self.program} {contender.port} --clients {clients} --tokens {self.tokens} --seconds {seconds}"
        return msgspec.json.decode(run([*command.split(), *(["--once"] if once else [])], request), type=Streams)


def whole_answer(contender: Contender, *, stream: bool, tokens: int) -> bytes:
    """Ask once and return the body of the answer. Raises: RuntimeError when it is not whole."""
    connection = http.client.HTTPConnection("127.0.0.1", contender.port, timeout=LIMIT_S)
    try:
        headers = {"Content-Type": "application/json", **contender.headers}
        connection.request("POST", PATH, body(stream), headers)
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    if answer.status != 200 or (stream and tokens_in(data) != tokens):
        raise RuntimeError(f"{contender.name} answered {answer.status}: {data[-2000:].decode(errors='replace')}")
    return data


def body(stream: bool) -> bytes:
    """Return the request that every client sends."""
    fields: dict[str, object] = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": PROMPT},
        ],
        "max_tokens": 4096,
        "temperature": 0.7,
    }
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(fields, separators=(",", ":")).encode()


def tokens_in(data: bytes) -> int:
    """Return how many tokens a stream brought, 0 when it did not come to its [DONE]."""
    events = [line[6:] for line in data.splitlines() if line.startswith(b"data: ")]
    if not events or events.pop() != b"[DONE]":
        return 0
    choices = [choice for event in events for choice in json.loads(event).get("choices", [])]
    return sum(bool(choice["delta"].get("content")) for choice in choices)


def rest(contender: Contender) -> None:
    """Wait until a gateway is at rest: one that does not cancel goes on with what its clients have left."""
    deadline = time.monotonic() + REST_LIMIT_S
    while time.monotonic() < deadline:
        before_s = contender.cpu_s()
        time.sleep(REST_S)
        if contender.cpu_s() - before_s < REST_SHARE * REST_S:
            return


def check_wrk() -> None:
    """Raise SystemExit when wrk is not installed."""
    if shutil.which("wrk") is None:
        sys.exit("There is no wrk: apt install wrk")


def run(command: list[str], data: bytes = b"", env: Mapping[str, str] = {}) -> bytes:
    """Run a program of clients and return what it wrote. Raises: RuntimeError."""
    done = subprocess.run(command, input=data, capture_output=True, check=False, env={**os.environ, **env})
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {(done.stdout + done.stderr).decode(errors='replace')[-2000:]}")
    return done.stdout


def children_cpu_s() -> float:
    """Return the CPU time of the programs of clients that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
