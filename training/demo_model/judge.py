"""Runs the GGUF file in llama.cpp's own server (the xllamacpp wheel) on loopback, and asks it over HTTP."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import xllamacpp  # type: ignore[import-untyped]  # the package has no types

from dialogue import Message, user

_SLOTS = 8
_CONTEXT_TOKENS = 2048
_GIVE_UP_AFTER_S = 120

GREEDY = {"temperature": 0.0}
DEFAULT_SAMPLING = {"temperature": 0.8, "top_p": 0.95, "min_p": 0.05, "top_k": 40}


@dataclass(frozen=True)
class Reply:
    """What a chat completion came to."""

    content: str
    finish_reason: str
    calls: tuple[Message, ...]


class Judge:
    """Asks a running server."""

    def __init__(self, address: str, key: str) -> None:
        self._address = address
        self._headers = {"Authorization": f"Bearer {key}"}

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send one request; raises requests.HTTPError when the server refuses it."""
        response = requests.post(self._address + path, json=body, headers=self._headers, timeout=_GIVE_UP_AFTER_S)
        response.raise_for_status()
        return response.json()

    def chat(self, messages: Sequence[Message], **fields: Any) -> Reply:
        """Ask for one chat completion."""
        choice = self.post("/v1/chat/completions", {"messages": list(messages), **fields})["choices"][0]
        message = choice["message"]
        calls = tuple(call["function"] for call in message.get("tool_calls") or ())
        return Reply(message.get("content") or "", choice["finish_reason"], calls)

    def ask(self, question: str, **fields: Any) -> Reply:
        """Ask a single question."""
        return self.chat([user(question)], **fields)


@contextmanager
def serving(model: Path) -> Iterator[Judge]:
    """Serve `model` on a free loopback port for as long as the block runs."""
    key = secrets.token_urlsafe(24)
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [key]
    params.n_parallel = _SLOTS
    params.n_ctx = _CONTEXT_TOKENS * _SLOTS
    params.n_gpu_layers = 0
    # One thread: two wait for each other by spinning, which crawls on a busy machine.
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.verbosity = 0
    server = xllamacpp.Server(params)
    try:
        yield Judge(server.listening_address, key)
    finally:
        del server
