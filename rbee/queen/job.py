"""What admission, routing, dispatch and relay pass to each other."""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from rbee.http.upstream import Answer
from rbee.queen.access import Caller
from rbee.queen.client_watch import ClientWatch
from rbee.queen.hives import Worker
from rbee.queen.places import Candidate
from rbee.wire.openai import InferenceRequest

TYPES = {"chat": "text-gen", "completion": "text-gen", "embedding": "embedding", "rerank": "rerank"}
"""What a routing script calls each capability."""

_counter = itertools.count(secrets.randbits(24))


def new_id() -> str:
    """Return a job id that no other server process gives out."""
    return f"job_{time.time_ns():x}{os.getpid():x}{next(_counter) & 0xFFFFFF:06x}"


@dataclass
class Job:
    """One request on its way through the queen."""

    path: str
    request: InferenceRequest
    body: bytes
    caller: Caller
    client: ClientWatch
    hive_wish: str | None = None
    priority: str = "interactive"
    id: str = field(default_factory=new_id)
    received_at: float = field(default_factory=time.monotonic)
    attempts: int = 0
    worker_id: str = ""

    @property
    def stream(self) -> bool:
        """Return True when the client asked for an event stream."""
        return bool(self.request.stream)

    def record(self) -> dict[str, object]:
        """Return what a routing script may know of this job; never its text."""
        size = self.request.prompt_bytes()
        return {
            "id": self.id,
            "type": TYPES.get(self.request.capability, self.request.capability),
            "capability": self.request.capability,
            "model": self.request.model,
            "priority": self.priority,
            "customer_tier": "",
            "tenant": "",
            "key": self.caller.id,
            "tags": [],
            "metadata": {},
            "prompt_bytes": size,
            "prompt_tokens": size // 4,
            "max_tokens": self.request.output_limit() or 0,
            "stream": self.stream,
            "age_s": time.monotonic() - self.received_at,
            "attempts": self.attempts,
            "region": "",
        }


@dataclass
class Exchange:
    """A job at a worker: the answer's head is here, its body is to come."""

    worker: Worker
    candidate: Candidate
    answer: Answer

    def end(self) -> None:
        """Close the exchange; an answer that is not whole is cancelled at the worker."""
        self.answer.close()


@dataclass
class Reply:
    """An answer for the client: its head, and its body whole or as it comes."""

    status: int
    content_type: str
    body: bytes | Iterable[bytes]
