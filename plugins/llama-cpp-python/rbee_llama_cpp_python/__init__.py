"""rbee worker plugin: GGUF models through llama-cpp-python, many jobs at once."""

from __future__ import annotations

import atexit
import importlib.metadata
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from rbee.plugin import (
    AnsweringBackend,
    Cancelled,
    Capability,
    Feature,
    FinishReason,
    Loaded,
    ModelSpec,
    Progress,
    Sampling,
    Token,
)
from rbee_llama_cpp_python.engine import Engine, Job
from rbee_llama_cpp_python.settings import OPTIONS, Settings, read_settings

if TYPE_CHECKING:  # the engine itself takes about half a second to import
    from rbee_llama_cpp_python.context import Context, EmbeddingContext
    from rbee_llama_cpp_python.model import Model

Tokens = Generator[Token, None, FinishReason]

_RANK_POOLING = 4


class LlamaCppPython(AnsweringBackend):
    """llama.cpp as a library: continuous batching, JSON schemas, embeddings."""

    name: ClassVar[str] = "llama-cpp-python"
    summary: ClassVar[str] = "llama.cpp as a Python library, built on the machine for its own CPU or GPU"
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.CHAT, Capability.COMPLETION, Capability.EMBEDDING}
    )
    features: ClassVar[frozenset[Feature]] = frozenset({Feature.JSON_SCHEMA})
    formats: ClassVar[frozenset[str]] = frozenset({"gguf"})
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda", "rocm", "metal"})
    options: ClassVar[Mapping[str, str]] = OPTIONS

    def __init__(self) -> None:
        self._model: Model | None = None
        self._context: Context | None = None
        self._engine: Engine | None = None
        self._embedder: EmbeddingContext | None = None
        self._embedding = threading.Lock()
        self._settings: Settings | None = None

    @classmethod
    def check(cls) -> str | None:
        """Return why llama-cpp-python cannot be imported (not installed, a missing library), or None."""
        try:
            import rbee_llama_cpp_python.model  # noqa: F401
        except Exception as error:  # noqa: BLE001  a broken shared library raises many things
            return f"llama_cpp cannot be imported: {error}"
        return None

    @classmethod
    def version(cls) -> str:
        """Return the version of llama-cpp-python, without importing it."""
        try:
            return importlib.metadata.version("llama-cpp-python")
        except importlib.metadata.PackageNotFoundError:
            return ""

    def load(self, spec: ModelSpec, progress: Progress) -> Loaded:
        """Load a GGUF file; raise ValueError for a bad option and EngineError where llama.cpp refuses."""
        settings = self._settings = read_settings(spec)
        from rbee_llama_cpp_python.context import Context, EmbeddingContext
        from rbee_llama_cpp_python.model import Model

        atexit.register(self.close)
        model = self._model = Model(settings, progress)
        pooling, embeds_only = _pooling(model, settings)
        if pooling is not None:
            self._embedder = EmbeddingContext(model, settings, pooling)
        if embeds_only and self._embedder is not None:
            return Loaded(settings.slots, self._embedder.context_tokens, frozenset({Capability.EMBEDDING}))
        context = self._context = Context(model, settings)
        self._engine = Engine(
            context,
            model,
            slots=settings.slots,
            batch_tokens=settings.batch_tokens,
            prompt_chunk_tokens=settings.prompt_chunk_tokens,
            cache_prompt=settings.cache_prompt,
        )
        embedding = {Capability.EMBEDDING} if self._embedder is not None else set()
        return Loaded(
            settings.slots, context.context_tokens, frozenset({Capability.CHAT, Capability.COMPLETION, *embedding})
        )

    def close(self) -> None:
        """Stop the decode thread, then free contexts before the model they point into."""
        atexit.unregister(self.close)
        if self._engine is not None:
            self._engine.close()
        with self._embedding:
            for part in (self._context, self._embedder, self._model):
                if part is not None:
                    part.close()

    def chat_template(self) -> str | None:
        """Return the Jinja text in the GGUF file, which the worker renders."""
        return self._loaded().chat_template()

    def special_tokens(self) -> Mapping[str, str]:
        """Return the texts of the model's own beginning and end tokens; one that it has not is absent."""
        model = self._loaded()
        texts = {"bos_token": model.token_text(model.bos()), "eos_token": model.token_text(model.eos())}
        return {name: text for name, text in texts.items() if text}

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Return the ids of a whole prompt, with the beginning token where the vocabulary asks for one."""
        return self._loaded().tokenize(text, special=special)

    def generate(self, prompt: Sequence[int], sampling: Sampling, cancelled: Cancelled) -> Tokens:
        """Yield tokens. Raise ValueError for a prompt or setting that the model cannot take."""
        if self._engine is None or self._context is None or self._settings is None:
            raise NotImplementedError("This model gives embeddings only")
        model, context, last = self._loaded(), self._context, self._settings.penalty_tokens
        _check_prompt(prompt, model.vocabulary_tokens, context.context_tokens - 1)  # one token of room for an answer
        from rbee_llama_cpp_python.sampling import Sampler, check

        if sampling.max_tokens is not None and sampling.max_tokens <= 0:
            check(sampling, model.vocabulary_tokens)
            return "length"

        def make_job() -> Job:
            return Job(prompt, sampling.max_tokens, Sampler(model, context, sampling, prompt, last), cancelled)

        return (yield from self._engine.generate(make_job))

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return one vector of length 1 per input. Raise ValueError for an input that does not fit the context."""
        embedder = self._embedder
        if embedder is None:
            raise NotImplementedError("This model gives no embeddings. Try: the option pooling=mean")
        for tokens in inputs:
            _check_prompt(tokens, self._loaded().vocabulary_tokens, embedder.context_tokens)
        vectors: list[list[float]] = []
        for group in _groups(inputs, embedder.sequences, embedder.context_tokens):
            with self._embedding:
                vectors.extend(embedder.embed(group))
        return vectors

    def _loaded(self) -> Model:
        if self._model is None:
            raise RuntimeError("No model is loaded")
        return self._model


def _pooling(model: Model, settings: Settings) -> tuple[int | None, bool]:
    """Return how to pool embeddings, None for not at all, and whether the model gives nothing else."""
    architecture = model.metadata("general.architecture") or ""
    own = model.metadata(f"{architecture}.pooling_type")
    if own == str(_RANK_POOLING):
        raise ValueError("This is a rerank model, which this engine does not score. Try: the engine xllamacpp")
    looks_both_ways = model.metadata(f"{architecture}.attention.causal") == "false"
    if looks_both_ways or own not in (None, "0"):
        return settings.pooling or int(own or 1), True
    if not model.can_generate():
        raise ValueError(f"This engine generates no text with the architecture {architecture!r}")
    return settings.pooling, False


def _check_prompt(tokens: Sequence[int], vocabulary_tokens: int, most_tokens: int) -> None:
    """Refuse what would make a whole batch invalid, and so hurt the jobs beside this one."""
    if not tokens:
        raise ValueError("The prompt is empty")
    if len(tokens) > most_tokens:
        raise ValueError(f"The prompt has {len(tokens)} tokens, but the model's context takes {most_tokens} at most")
    if min(tokens) < 0 or max(tokens) >= vocabulary_tokens:
        raise ValueError(f"The prompt has a token that the model does not know: its ids end at {vocabulary_tokens - 1}")


def _groups(inputs: Sequence[Sequence[int]], count: int, tokens: int) -> Iterator[list[Sequence[int]]]:
    """Cut inputs into groups of at most `count` inputs and `tokens` tokens together."""
    group: list[Sequence[int]] = []
    for one in inputs:
        if group and (len(group) == count or sum(map(len, group)) + len(one) > tokens):
            yield group
            group = []
        group.append(one)
    if group:
        yield group
