"""The clients of one measurement, in a process of their own so that they take no time from the one who measures.

usage: python -m bench.worker.load < ORDER.json > RESULT.json

Each client is a thread that asks for streamed chat completions one after the other, each on a new connection.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

LIMIT_S = 120.0
# It begins differently each time, so that no engine finds it in its cache.
PROMPT = "{label}.{client}.{request}: a story about bees, please"


class Order(msgspec.Struct, frozen=True):
    """Whom to ask, and for what. `url` is http://host:port or unix:/path."""

    url: str
    token: str
    model: str
    clients: int
    requests: int
    max_tokens: int
    label: str


class Answer(msgspec.Struct, frozen=True):
    """One answer. `problem` says why it is not whole; an answer that is not whole counts no tokens."""

    first_token_s: float
    tokens: int = 0
    problem: str = ""


class Result(msgspec.Struct, frozen=True):
    """What all clients got, from the first request to the end of the last answer. `cpu_s` is what the clients took."""

    seconds: float
    cpu_s: float
    answers: list[Answer]

    @property
    def whole(self) -> int:
        """Return how many answers are whole."""
        return sum(not answer.problem for answer in self.answers)

    @property
    def tokens(self) -> int:
        """Return the tokens of whole answers."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """Return the tokens of whole answers in a second."""
        return self.tokens / self.seconds


def main() -> None:
    """Read an order, carry it out, write the result."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    sys.stdout.buffer.write(msgspec.json.encode(carry_out(order)))


def carry_out(order: Order) -> Result:
    """Let all clients ask at once, and wait for the last."""
    answers: list[Answer] = []
    start = threading.Barrier(order.clients + 1)

    def client(number: int) -> None:
        start.wait()
        for request in range(order.requests):
            answers.append(ask(order, PROMPT.format(client=number, request=request, label=order.label)))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(order.clients)]
    for thread in threads:
        thread.start()
    start.wait()
    started, cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.join()
    return Result(time.perf_counter() - started, time.process_time() - cpu, answers)


def ask(order: Order, prompt: str) -> Answer:
    """Ask once and read the stream to its end."""
    body = {
        "model": order.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": order.max_tokens,
        "temperature": 0,
        "stream": True,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {order.token}"}
    connection = connect(order.url)
    started = time.perf_counter()
    lines: list[bytes] = []
    first_s = 0.0
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        # Read now, understand later: the clients share the machine with what they measure.
        for line in response:
            lines.append(line)
            if not first_s and b'"content":' in line and b'"content":null' not in line.replace(b" ", b""):
                first_s = time.perf_counter() - started
    except (OSError, http.client.HTTPException) as problem:
        return Answer(first_s, problem=f"the connection broke: {problem!r}")
    finally:
        connection.close()
    return judge(order, response.status, lines, first_s)


def judge(order: Order, status: int, lines: list[bytes], first_s: float) -> Answer:
    """Say whether an answer is whole. The model writes one letter a token and never stops by itself."""
    if status != 200:
        return Answer(first_s, problem=f"status {status}: {b''.join(lines)[:200].decode(errors='replace')}")
    stream = Stream()
    for line in lines:
        if line.startswith(b"data:"):
            stream.take(line[5:].strip())
    if stream.done and stream.reason == "length" and len(stream.text) == order.max_tokens:
        return Answer(first_s, len(stream.text))
    end = f"finish_reason {stream.reason}, {'with' if stream.done else 'without'} [DONE]"
    return Answer(first_s, problem=f"{len(stream.text)} of {order.max_tokens} tokens, {end} {stream.error}".strip())


@dataclass
class Stream:
    """What the events of one answer said."""

    text: str = ""
    reason: str | None = None
    done: bool = False
    error: str = ""

    def take(self, data: bytes) -> None:
        """Take the data of one event."""
        if data == b"[DONE]":
            self.done = True
            return
        event: dict[str, Any] = json.loads(data)
        self.error = str(event.get("error") or self.error)
        for choice in event.get("choices") or ():
            self.text += choice["delta"].get("content") or ""
            self.reason = choice.get("finish_reason") or self.reason


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=LIMIT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(LIMIT_S)
        self.sock.connect(self._path)


def connect(url: str) -> http.client.HTTPConnection:
    """Return a connection that is opened at the first request."""
    if url.startswith("unix:"):
        return UnixConnection(url.removeprefix("unix:"))
    parts = urlsplit(url)
    assert parts.hostname
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=LIMIT_S)


if __name__ == "__main__":
    main()
