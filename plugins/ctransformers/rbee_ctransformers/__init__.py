"""rbee worker plugin: models in the GGML formats from before GGUF, through ctransformers."""

from __future__ import annotations

import importlib.metadata
import secrets
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from rbee.plugin import (
    AnsweringBackend,
    Cancelled,
    Capability,
    FinishReason,
    Loaded,
    ModelSpec,
    Progress,
    Sampling,
    Token,
)
from rbee_ctransformers.settings import OPTIONS, read_settings

if TYPE_CHECKING:  # the engine takes half a second to import
    from rbee_ctransformers.native import Model

Tokens = Generator[Token, None, FinishReason]

TURN_CHECK_S = 0.1


class Ctransformers(AnsweringBackend):
    """The old model families, one job at a time: the engine keeps one sequence."""

    name: ClassVar[str] = "ctransformers"
    summary: ClassVar[str] = "models in the GGML formats from before GGUF: GPT-2, GPT-J, MPT, StarCoder and others"
    capabilities: ClassVar[frozenset[Capability]] = frozenset({Capability.CHAT, Capability.COMPLETION})
    formats: ClassVar[frozenset[str]] = frozenset({"ggml"})
    options: ClassVar[Mapping[str, str]] = OPTIONS

    def __init__(self) -> None:
        self._model: Model | None = None
        self._batch_tokens = 1
        self._turn = threading.Lock()

    @classmethod
    def check(cls) -> str | None:
        """Return why ctransformers or its shared library cannot be loaded on this machine, or None."""
        try:
            from rbee_ctransformers.native import try_library

            try_library()
        except Exception as error:  # noqa: BLE001  a broken package or library raises many things
            return f"ctransformers cannot be loaded: {' '.join(str(error).split())}"
        return None

    @classmethod
    def version(cls) -> str:
        """Return the version of ctransformers, without importing it."""
        try:
            return importlib.metadata.version("ctransformers")
        except importlib.metadata.PackageNotFoundError:
            return ""

    def load(self, spec: ModelSpec, progress: Progress) -> Loaded:
        """Load a GGML file; raise ValueError for a bad option and RuntimeError when the engine refuses the file."""
        settings = read_settings(spec)
        from rbee_ctransformers.native import Model

        self._batch_tokens = settings.batch_tokens
        self._model = Model(settings)
        progress(1.0)
        return Loaded(slots=1, context_tokens=self._model.context_tokens)

    def close(self) -> None:
        """Free the model; a job that runs ends with an error at its next token."""
        if self._model is not None:
            self._model.close()

    def special_tokens(self) -> Mapping[str, str]:
        """Return the text of the model's end token, where it has one."""
        model = self._loaded()
        text = model.piece(model.eos).decode("utf-8", "replace") if model.ends(model.eos) else ""
        return {"eos_token": text} if text else {}

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Return the ids of a text. The engine always reads a family's control tokens, so `special` changes nothing."""
        return self._loaded().tokenize(text)

    def generate(self, prompt: Sequence[int], sampling: Sampling, cancelled: Cancelled) -> Tokens:
        """Yield tokens; jobs take turns. Raise ValueError for a prompt or setting that the model cannot take."""
        from rbee_ctransformers.sampling import check

        model = self._loaded()
        check(sampling, model.vocabulary_tokens)
        _check_prompt(prompt, model)
        if sampling.max_tokens is not None and sampling.max_tokens <= 0:
            return "length"
        while not self._turn.acquire(timeout=TURN_CHECK_S):
            if cancelled():
                return "stop"
        try:
            return (yield from self._write(model, prompt, sampling, cancelled))
        finally:
            self._turn.release()

    def _write(self, model: Model, prompt: Sequence[int], sampling: Sampling, cancelled: Cancelled) -> Tokens:
        import numpy as np

        from rbee_ctransformers.sampling import PENALTY_TOKENS, choose, log_probability

        random = np.random.default_rng(secrets.randbits(63) if sampling.seed is None else abs(sampling.seed))
        tokens = list(prompt)
        ahead = model.begin(tokens)
        while True:
            for start in range(0, len(ahead), self._batch_tokens):
                if cancelled():
                    return "stop"
                model.compute(ahead[start : start + self._batch_tokens])
            logits = model.logits()
            token = choose(logits.copy(), sampling, tokens[-PENALTY_TOKENS:], random)
            if model.ends(token):
                return "stop"
            yield Token(model.piece(token), token, log_probability(logits, token))
            tokens.append(token)
            if len(tokens) - len(prompt) == sampling.max_tokens or len(tokens) >= model.context_tokens:
                return "length"
            ahead = [token]

    def _loaded(self) -> Model:
        if self._model is None:
            raise RuntimeError("No model is loaded")
        return self._model


def _check_prompt(prompt: Sequence[int], model: Model) -> None:
    """Refuse what the engine would not check: it reads past its arrays for an unknown token or a full context."""
    if not prompt:
        raise ValueError("The prompt is empty, or the model has no token for any of its characters")
    if len(prompt) >= model.context_tokens:
        most = model.context_tokens - 1
        raise ValueError(f"The prompt has {len(prompt)} tokens, but the model's context takes {most} at most")
    if min(prompt) < 0 or max(prompt) >= model.vocabulary_tokens:
        last = model.vocabulary_tokens - 1
        raise ValueError(f"The prompt has a token that the model does not know: its ids end at {last}")
