"""An OpenAI-compatible server without a model, as a process of its own: it says the last message's words back.

Gateways are tested against it: it fails on command, and tells what it was asked. `python -m rbee.testing.openai_server`
is that process; `running_server` starts it.
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
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from rbee.client import Client
from rbee.http.server import Request, Response, Routes, Server, reply

HANG_S = 600.0
LOOK_EVERY_S = 0.02


class Manner(Struct, frozen=True, kw_only=True):
    """How jobs are answered, until another manner is set.

    `answer` is ok, or error (500), busy (503 with Retry-After), drop (the connection closes without a byte), hang
    (nothing comes), or break (a stream stops after its first half, a whole answer is cut). `first_s` is the time before
    the first byte of an answer, as the reading of a prompt takes, `word_s` that between two words of a stream, and
    before a whole answer. Each event of a stream is made longer by `padding_bytes`. With `usage` asked, a stream tells
    it as OpenAI's do, where `stream_options.include_usage` wants it; with never, nothing does.
    """

    answer: Literal["ok", "error", "busy", "drop", "hang", "break"] = "ok"
    first_s: Annotated[float, Meta(ge=0)] = 0.0
    word_s: Annotated[float, Meta(ge=0)] = 0.0
    padding_bytes: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    usage: Literal["always", "asked", "never"] = "always"

    def tells_usage(self, asked: dict[str, Any]) -> bool:
        """Return whether the answer to a request tells how many tokens it took."""
        wanted = not asked.get("stream") or (asked.get("stream_options") or {}).get("include_usage")
        return self.usage == "always" or (self.usage == "asked" and bool(wanted))


class Told(Struct, frozen=True, kw_only=True):
    """What came in: how many jobs, and of the last one its path, model, bearer token, trace and body.

    `in_flight` jobs are under way, `answered` ones were answered whole and well, with `tokens` written in all; of
    `cancelled` ones the client closed the connection before that.
    """

    jobs: int = 0
    in_flight: int = 0
    answered: int = 0
    cancelled: int = 0
    tokens: int = 0
    path: str = ""
    model: str = ""
    token: str = ""
    traceparent: str = ""
    body: dict[str, Any] = {}


@dataclass
class RunningServer:
    """A running server; `url` is its base address, with the `/v1`."""

    process: subprocess.Popen[str]
    port: int
    url: str
    client: Client

    def behave(self, **manner: Any) -> None:
        """Answer jobs in another manner (`Manner`) from here on."""
        self.client.post("/control", manner, dict[str, Any])

    def told(self) -> Told:
        """Return what came in."""
        return self.client.get("/control", Told)


@contextlib.contextmanager
def running_server(
    model: str = "honey", *, port: int = 0, base: str = "/v1", key: str = "", word_s: float = 0.0
) -> Iterator[RunningServer]:
    """Start a server that lists `model` under `base`; with a `key` it refuses others. End it afterwards."""
    words = ["--model", model, "--port", port, "--base", base, "--key", key, "--word-s", word_s]
    command = [sys.executable, "-m", "rbee.testing.openai_server", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, "the server did not start"
        at = f"http://127.0.0.1:{int(line)}"
        with contextlib.closing(Client(at)) as client:
            yield RunningServer(process, int(line), at + base, client)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@dataclass
class _Server:
    """What the process holds."""

    model: str
    key: str
    manner: Manner
    told: Told = field(default_factory=Told)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def models(self, request: Request) -> Response:
        if self.key:
            request.require(self.key)
        return reply({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    def behave(self, request: Request) -> Response:
        self.manner = request.json(Manner)
        return reply({})

    def tell(self, request: Request) -> Response:
        return reply(self.told)

    def answer(self, request: Request) -> Response:
        if self.key:
            request.require(self.key)
        asked, manner = request.json(dict[str, Any]), self.manner
        self._note(request, asked)
        try:
            answer = self._answer(request, asked, manner)
        except BaseException:
            self._end(cancelled=request.gone())
            raise
        if isinstance(answer.body, bytes):
            self._end(tokens=len(_prompt(asked).split()) if answer.status == 200 else None)
        return answer

    def _note(self, request: Request, asked: dict[str, Any]) -> None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        with self.lock:
            self.told = msgspec.structs.replace(
                self.told,
                jobs=self.told.jobs + 1,
                in_flight=self.told.in_flight + 1,
                path=request.path,
                model=str(asked.get("model")),
                token=token,
                traceparent=request.headers.get("traceparent", ""),
                body=asked,
            )

    def _end(self, *, tokens: int | None = None, cancelled: bool = False) -> None:
        """Count a job out; `tokens` of one that was answered well."""
        with self.lock:
            told = self.told
            self.told = msgspec.structs.replace(
                told,
                in_flight=told.in_flight - 1,
                answered=told.answered + (tokens is not None),
                cancelled=told.cancelled + cancelled,
                tokens=told.tokens + (tokens or 0),
            )

    def _answer(self, request: Request, asked: dict[str, Any], manner: Manner) -> Response:
        if manner.answer == "error":
            return reply({"error": {"message": "this server is broken", "type": "server_error"}}, 500)
        if manner.answer == "busy":
            full = {"error": {"message": "this server is full", "type": "server_error"}}
            return Response(msgspec.json.encode(full), 503, headers={"Retry-After": "1"})
        if manner.answer == "drop":
            raise ConnectionResetError("dropped, as was wanted")
        _pass(request, HANG_S if manner.answer == "hang" else manner.first_s)
        words = _prompt(asked).split()
        if asked.get("stream"):
            return Response(self._events(request, asked, words, manner), content_type="text/event-stream")
        _pass(request, manner.word_s)
        values = _whole(asked, words)
        if not manner.tells_usage(asked):
            del values["usage"]
        whole = msgspec.json.encode(values)
        return Response(self._cut(whole) if manner.answer == "break" else whole)

    def _cut(self, whole: bytes) -> Iterator[bytes]:
        try:
            yield whole[: len(whole) // 2]
            raise ConnectionResetError("cut, as was wanted")
        finally:
            self._end()

    def _events(self, request: Request, asked: dict[str, Any], words: list[str], manner: Manner) -> Iterator[bytes]:
        tokens, padding = None, " " * manner.padding_bytes
        try:
            for count, word in enumerate(words):
                if manner.answer == "break" and count >= len(words) / 2:
                    raise ConnectionResetError("broken off, as was wanted")
                delta = {"choices": [{"index": 0, "delta": {"content": f"{word} {padding}"}, "finish_reason": None}]}
                yield b"data: " + msgspec.json.encode({"model": asked.get("model"), **delta}) + b"\n\n"
                _pass(request, manner.word_s)
            if manner.tells_usage(asked):
                yield b"data: " + msgspec.json.encode({"choices": [], "usage": _usage(words)}) + b"\n\n"
            yield b"data: [DONE]\n\n"
            tokens = len(words)
        finally:
            self._end(tokens=tokens, cancelled=tokens is None and request.gone())


def _pass(request: Request, seconds: float) -> None:
    """Let time pass, as long as the client waits. Raises: BrokenPipeError when it has left."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if request.gone():
            raise BrokenPipeError("the client has left")
        time.sleep(min(left, LOOK_EVERY_S))


def _prompt(asked: dict[str, Any]) -> str:
    if "messages" in asked:
        return str(asked["messages"][-1]["content"])
    return str(asked.get("prompt") or asked.get("input") or "")


def _whole(asked: dict[str, Any], words: list[str]) -> dict[str, Any]:
    if "input" in asked:
        return {
            "object": "list",
            "data": [{"index": 0, "embedding": [0.0, 1.0]}],
            "usage": {"prompt_tokens": len(words)},
        }
    text = " ".join(words)
    choice = {"message": {"role": "assistant", "content": text}} if "messages" in asked else {"text": text}
    choices = [{"index": 0, "finish_reason": "stop", **choice}]
    return {"id": "x", "model": asked.get("model"), "choices": choices, "usage": _usage(words)}


def _usage(words: list[str]) -> dict[str, int]:
    return {"prompt_tokens": len(words), "completion_tokens": len(words), "total_tokens": 2 * len(words)}


def main() -> None:
    """Serve until it is killed; the first line of the output is the port."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="honey")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--base", default="/v1")
    parser.add_argument("--key", default="")
    parser.add_argument("--word-s", type=float, default=0.0)
    told = parser.parse_args()
    routes = Routes()
    server = Server("127.0.0.1", told.port, routes)
    fake = _Server(told.model, told.key, Manner(word_s=told.word_s))
    routes.add("GET", f"{told.base}/models", fake.models)
    for path in ("chat/completions", "completions", "embeddings"):
        routes.add("POST", f"{told.base}/{path}", fake.answer)
    routes.add("GET", "/control", fake.tell)
    routes.add("POST", "/control", fake.behave)
    print(server.port, flush=True)
    server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
