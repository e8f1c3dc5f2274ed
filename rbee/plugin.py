"""The contract between rbee and a worker backend.

A backend is one class, named by an entry point in the group `rbee.backends`. Its class attributes say
what it can do without loading anything; one instance runs one model in one worker process.
There are two shapes:

- `ServingBackend`: the engine is an HTTP server that speaks OpenAI itself. It gives an address, and rbee
  relays bytes to it, so every feature of the engine arrives unharmed.
- `AnsweringBackend`: the engine is a library. It generates text from a prompt, and the worker speaks
  OpenAI HTTP for it: chat templates, streaming, stop sequences, usage, errors.

Importing a module that defines a backend must be cheap: import the engine itself in `check` or `load`.
This module imports the standard library only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Literal

API_VERSION = 1
ENTRY_POINT_GROUP = "rbee.backends"


class Capability(StrEnum):
    """A kind of work that a worker can do."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RERANK = "rerank"
    IMAGE = "image"
    TRANSCRIPTION = "transcription"
    SPEECH = "speech"
    VIDEO = "video"
    MODERATION = "moderation"


class Feature(StrEnum):
    """Something an engine offers beyond the plain form of a capability."""

    RESPONSES = "responses"
    MESSAGES = "messages"
    TOOLS = "tools"
    JSON_SCHEMA = "json_schema"
    LOGPROBS = "logprobs"
    VISION = "vision"


@dataclass(frozen=True)
class ModelSpec:
    """One model to run, and how.

    `path` is None for a backend that needs no file. `gpus` are device indices on this host; empty means CPU.
    `threads` 0 means that the backend chooses. `options` are the engine's own settings, as in an inventory line.
    """

    name: str
    path: Path | None = None
    format: str | None = None
    capabilities: frozenset[Capability] = frozenset()
    context_tokens: int = 0
    slots: int = 0
    threads: int = 0
    device: str = "cpu"
    gpus: tuple[int, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Endpoint:
    """Where a serving engine listens: `unix:/path` or `http://127.0.0.1:PORT`, and the bearer token it checks."""

    url: str
    token: str


@dataclass(frozen=True)
class Loaded:
    """What a backend tells once its model is loaded.

    `slots` is how many jobs it takes at once; further jobs wait in the worker, in order. `capabilities` empty and
    `features` None mean those of the class; an engine tells its own where they depend on the model (vision, say).
    """

    slots: int
    context_tokens: int | None = None
    capabilities: frozenset[Capability] = frozenset()
    features: frozenset[Feature] | None = None


@dataclass(frozen=True)
class Sampling:
    """How to generate. `max_tokens` None means until the model stops or the context is full.

    `temperature` 0 must be greedy, so that the same request gives the same text. `seed` None means a random one.
    `stop` sequences and the end of the context are handled by the worker as well; a backend may end earlier.
    """

    max_tokens: int | None = None
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    json_schema: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Token:
    """One step of generation: the bytes it adds, its id and, where known, its log probability."""

    data: bytes
    id: int = -1
    logprob: float | None = None


FinishReason = Literal["stop", "length"]
Progress = Callable[[float], None]
Cancelled = Callable[[], bool]


class Backend(ABC):
    """What every backend says about itself. Subclass `ServingBackend` or `AnsweringBackend` instead."""

    api_version: ClassVar[int] = API_VERSION
    name: ClassVar[str]
    summary: ClassVar[str]
    capabilities: ClassVar[frozenset[Capability]]
    features: ClassVar[frozenset[Feature]] = frozenset()
    formats: ClassVar[frozenset[str]] = frozenset()
    """File formats that it loads, as `rbee.formats` names them ("gguf", "ggml"); empty: it needs no file."""
    devices: ClassVar[frozenset[str]] = frozenset({"cpu"})
    options: ClassVar[Mapping[str, str]] = {}
    """Engine options that an inventory line or `--option KEY=VALUE` may set, each with a line of help."""

    @classmethod
    def check(cls) -> str | None:
        """Return why this engine cannot run on this machine, or None when it can."""
        return None

    @classmethod
    def version(cls) -> str:
        """Return the engine's own version, or an empty string."""
        return ""

    def close(self) -> None:  # noqa: B027  a backend with nothing to free need not say so
        """Free what `load` took. Called once, also after a failed load."""


class ServingBackend(Backend):
    """An engine that is an OpenAI-compatible HTTP server."""

    cancels_whole_answers: ClassVar[bool] = True
    """False when closing the connection of a job that does not stream may leave it running; the worker then asks the
    engine for a stream and puts the answer together itself."""

    @abstractmethod
    def load(self, spec: ModelSpec, listen: Endpoint, progress: Progress) -> Loaded:
        """Start the engine at `listen`, wait until it answers, and tell what it can do.

        It must check `listen.token` as a bearer token on every request, listen nowhere else, and cancel a job
        whose client closes the connection. Raise any exception to refuse; its text is shown to the person.
        """

    def alive(self) -> bool:
        """Return False when the engine has died; the worker then ends with an error."""
        return True


class AnsweringBackend(Backend):
    """An engine that is a library in this process. Its methods are called from several threads at once."""

    @abstractmethod
    def load(self, spec: ModelSpec, progress: Progress) -> Loaded:
        """Load the model. Raise any exception to refuse; its text is shown to the person."""

    def chat_template(self) -> str | None:
        """Return the model's own Jinja chat template, or None for a plain one."""
        return None

    def special_tokens(self) -> Mapping[str, str]:
        """Return the texts that a chat template may name: `bos_token`, `eos_token`."""
        return {}

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Return the token ids of `text`; `special` reads control tokens such as `<|user|>` as one token."""
        raise NotImplementedError(f"{self.name} does not tokenize")

    def generate(self, prompt: Sequence[int], sampling: Sampling, cancelled: Cancelled) -> Iterator[Token]:
        """Yield tokens until the model stops, `sampling.max_tokens` is reached or `cancelled()` is true.

        The generator's return value is the `FinishReason`. A job must never disturb another one; when more jobs
        come than `Loaded.slots`, the worker holds them back. `cancelled` is cheap: ask it at least once a token.
        """
        raise NotImplementedError(f"{self.name} does not generate text")

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return one vector per token sequence."""
        raise NotImplementedError(f"{self.name} does not embed")

    def rerank(self, query: str, documents: Sequence[str]) -> tuple[list[float], int]:
        """Return one relevance score per document, and the number of tokens read."""
        raise NotImplementedError(f"{self.name} does not rerank")
