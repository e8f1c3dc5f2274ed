"""What admission, routing, dispatch and relay pass to each other."""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rbee.http.upstream import Answer
from rbee.queen.access import Caller
from rbee.queen.client_watch import ClientWatch
from rbee.queen.hives import Worker
from rbee.queen.owners import Signature
from rbee.queen.places import Candidate
from rbee.queen.policy import Priority
from rbee.wire.openai import InferenceRequest

if TYPE_CHECKING:
    from rbee.queen.tracing import Trace

TYPES = {
    "chat": "text-gen",
    "completion": "text-gen",
    "embedding": "embedding",
    "rerank": "rerank",
    "image": "image-gen",
    "transcription": "audio-transcription",
    "speech": "audio-speech",
    "video": "video-gen",
    "moderation": "moderation",
}
"""What a routing script calls each capability."""

BYTES_A_TOKEN = 4
"""What a token is taken for where nobody has counted: near enough for English text."""

QUEUED, ROUTING, LOADING, PREFILL, DECODE, WHOLE = "queued", "routing", "loading", "prefill", "decode", "whole"

TOKENS_TO_TELL = 8
"""From how many tokens on a stream says how fast its worker is."""

_counter = itertools.count(secrets.randbits(24))


def smoothed(old: float, new: float) -> float:
    """Return a worker's average after one more value; the first stands for itself."""
    return new if old == 0.0 else 0.8 * old + 0.2 * new


def new_id() -> str:
    """Return a job id that no other server process gives out."""
    return f"job_{time.time_ns():x}{os.getpid():x}{next(_counter) & 0xFFFFFF:06x}{Signature.text}"


@dataclass
class Job:
    """One request on its way through the queen."""

    path: str
    request: InferenceRequest
    body: bytes
    caller: Caller
    client: ClientWatch
    hive_wish: str | None = None
    priority: Priority = "interactive"
    said: str = ""
    """The client's own word for its priority, which scripts see; empty where it is the same."""
    region: str = ""
    """Where it must run; empty: anywhere."""
    tags: tuple[str, ...] = ()
    """Words of the client's own, for the routing script."""
    id: str = field(default_factory=new_id)
    received_at: float = field(default_factory=time.monotonic)
    attempts: int = 0
    queued: bool = False
    """It waits for its turn in its model's queue."""
    aside: Callable[[bool], None] | None = None
    """What lets others of the queue go ahead (True) and takes the turn back (False); None while it has no turn."""
    worker_id: str = ""
    phases: list[tuple[str, float]] = field(default_factory=list)
    """What was done with it, and since when (time.monotonic()): queued, routing, loading, then prefill and decode, or
    whole, of an answer that comes at once; a second attempt begins with routing again."""
    failed_at: set[str] = field(default_factory=set)
    """The workers that failed this job."""
    created_at: float = field(default_factory=time.time)
    kind: str = "request"
    metadata: dict[str, str] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usage_estimated: bool = False
    """The tokens above are the queen's estimate: the engine told none."""
    problem: BaseException | None = None
    answering: bool = False
    """Something of its answer was shown."""
    answered: bool = False
    """Its answer was whole. A job that was never admitted has neither this nor a problem."""
    trace: Trace | None = None
    """Where it stands in its trace, while one is made."""
    on_event: Callable[[str, str], None] | None = None
    on_end: Callable[[Job, BaseException | None], None] | None = None

    _facts: dict[str, object] | None = field(default=None, repr=False)

    @property
    def stream(self) -> bool:
        """Return True when the client asked for an event stream."""
        return bool(self.request.stream)

    def enter(self, phase: str) -> None:
        """Note that its next phase begins; of an earlier run, nothing is left in `queued`."""
        if phase == QUEUED:
            self.phases.clear()
        self.phases.append((phase, time.monotonic()))

    @property
    def phase(self) -> str:
        """Return what is done with it."""
        return self.phases[-1][0] if self.phases else QUEUED

    @contextmanager
    def stepped_aside(self) -> Iterator[None]:
        """Let others of the same queue go ahead while this job waits for something else than a worker's slot."""
        if self.aside is None:
            yield
            return
        self.aside(True)
        try:
            yield
        finally:
            self.aside(False)

    def tell(self, event: str, place: str) -> None:
        """Tell whoever follows this job that it was routed to a place, or started there."""
        if self.on_event is not None:
            self.on_event(event, place)

    @property
    def type(self) -> str:
        """Return what a routing script calls this kind of job."""
        return TYPES.get(self.request.capability, self.request.capability)

    @property
    def tenant(self) -> str:
        """Return whose job this is; empty where keys name no tenant."""
        return self.caller.tenant

    def texts(self) -> Iterable[str]:
        """Return the texts of the prompt in their order, for what is reckoned from them and never kept."""
        prompt = getattr(self.request, "prompt", None)
        if isinstance(prompt, str):
            return [prompt]
        turns = getattr(self.request, "messages", ())
        return [turn.content for turn in turns if isinstance(getattr(turn, "content", None), str)]

    def record(self) -> dict[str, object]:
        """Return what a routing script may know of this job; never its text."""
        facts = self._facts
        if facts is None:
            facts = self._facts = self._record()
        facts["age_s"] = time.monotonic() - self.received_at
        facts["attempts"] = self.attempts
        facts["priority"] = self.said or self.priority
        return facts

    def _record(self) -> dict[str, object]:
        size, most = self.request.prompt_bytes(), self.request.output_limit() or 0
        return {
            "id": self.id,
            "type": self.type,
            "capability": self.request.capability,
            "model": self.request.model,
            "priority": self.priority,
            "customer_tier": self.caller.policy.tier,
            "tenant": self.tenant,
            "key": self.caller.id,
            "tags": list(self.tags),
            "metadata": self.metadata or _labels(getattr(self.request, "metadata", None)),
            "prompt_bytes": size,
            "prompt_tokens": size // BYTES_A_TOKEN,
            "max_tokens": most,
            "max_bytes": most * BYTES_A_TOKEN,
            "stream": self.stream,
            "age_s": 0.0,
            "attempts": 0,
            "region": self.region,
        }


def _labels(metadata: object) -> dict[str, str]:
    """Return what a request's own metadata may tell a script: OpenAI's 16 pairs of short texts."""
    if not isinstance(metadata, dict):
        return {}
    pairs = [(key, value) for key, value in metadata.items() if isinstance(value, str) and len(value) <= 512]
    return {key: value for key, value in pairs[:16] if len(key) <= 64}


@dataclass
class Exchange:
    """A job at a worker: the answer's head is here, its body is to come."""

    worker: Worker
    candidate: Candidate
    answer: Answer
    began_at: float = field(default_factory=time.monotonic)

    def note_speed(self, tokens: int) -> None:
        """Note how fast a stream of so many tokens came, for the routing script; a short one tells nothing."""
        took_s = time.monotonic() - self.began_at
        if tokens >= TOKENS_TO_TELL and took_s > 0:
            self.worker.tokens_per_second = smoothed(self.worker.tokens_per_second, tokens / took_s)

    def end(self) -> None:
        """Close the exchange; an answer that is not whole is cancelled at the worker."""
        self.answer.close()


@dataclass
class Reply:
    """An answer for the client: its head, and its body whole or as it comes."""

    status: int
    content_type: str
    body: bytes | Iterable[bytes]
