"""The engine behind one typed class. Importing this module imports ctransformers, and with it huggingface_hub."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ctransformers.llm import LLM, Config, load_library  # type: ignore[import-untyped]  # it ships no types

from rbee_ctransformers.sampling import Logits
from rbee_ctransformers.settings import Settings, best_library
from rbee_ctransformers.text import parts

_ENGINE = threading.Lock()
"""Held in every call: the library computes in static memory, shared even by two models of one process."""

_WORD_SPLITTERS = frozenset({"gpt2", "gptj", "gpt_neox", "dolly-v2", "mpt", "starcoder"})
"""Families whose texts are cut before the tokenizer; the others split by pairs or pieces, without std::regex."""


def chosen_library(wanted: str | None) -> str | None:
    """Return the build to load, or None where ctransformers must find out by itself."""
    try:
        return wanted or best_library(Path("/proc/cpuinfo").read_text())
    except OSError:
        return None


def try_library() -> None:
    """Load the shared library without a model; raise OSError with the reason when it does not load here."""
    load_library(chosen_library(None))


class Closed(RuntimeError):
    """The model is freed, because the worker ends."""


class Model:
    """One loaded model with its one sequence. Calls from several threads wait for each other."""

    def __init__(self, settings: Settings) -> None:
        """Load a file; raise RuntimeError when the engine refuses it, with its own words on stderr."""
        config = Config(
            batch_size=settings.batch_tokens, threads=settings.threads, context_length=settings.context_tokens
        )
        self._llm: LLM | None = None
        self._splits_words = settings.family in _WORD_SPLITTERS
        with _ENGINE:
            library = chosen_library(settings.library)
            try:
                self._llm = LLM(str(settings.path), settings.family, config=config, lib=library)
            except RuntimeError as error:
                raise RuntimeError(
                    f"ctransformers cannot load {settings.path} as {settings.family}; its reason is in this log above. "
                    "Try: another model_type"
                ) from error
            self.context_tokens = int(self._llm.context_length)
            self.vocabulary_tokens = int(self._llm.vocab_size)
            self.eos = int(self._llm.eos_token_id)

    def close(self) -> None:
        """Free the model; a call that waits raises Closed."""
        with _ENGINE:
            self._llm = None

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text. Bytes that no token covers are left out by the engine."""
        data = text.encode("utf-8", "replace")
        cut = parts(data) if self._splits_words else [data.replace(b"\0", b"")]
        ids: list[int] = []
        for part in cut:
            with _ENGINE:
                ids.extend(self._tokenize(part, begins=not ids))
        return ids

    def _tokenize(self, data: bytes, *, begins: bool) -> list[int]:
        # Not LLM.tokenize: its buffer has one place per character, but a character may become a token per byte.
        llm = self._open()
        buffer = (ctypes.c_int * (len(data) + 2))()
        add_bos = begins and llm.model_type == "llama"
        count = int(llm.ctransformers_llm_tokenize(data, add_bos, buffer))
        return [int(token) for token in buffer[:count]]

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token adds."""
        with _ENGINE:
            return bytes(self._open().detokenize([token], decode=False))

    def ends(self, token: int) -> bool:
        """Tell whether a token ends the generation."""
        with _ENGINE:
            return bool(self._open().is_eos_token(token))

    def begin(self, prompt: Sequence[int]) -> list[int]:
        """Go back to what is already computed of a prompt; return the tokens that are left to compute, at least one."""
        with _ENGINE:
            return list(self._open().prepare_inputs_for_generation(prompt, reset=True))

    def compute(self, tokens: Sequence[int]) -> None:
        """Compute tokens after those before; raise RuntimeError when the engine fails."""
        with _ENGINE:
            self._open().eval(tokens)

    def logits(self) -> Logits:
        """Return a copy of the logits after the last computed token."""
        with _ENGINE:
            llm = self._open()
            size = int(llm.ctransformers_llm_logits_size())
            if size < self.vocabulary_tokens:
                raise RuntimeError("ctransformers has no logits for the last token")
            values = np.ctypeslib.as_array(llm.ctransformers_llm_logits_data(), shape=(size,))
            return values[size - self.vocabulary_tokens :].astype(np.float64)

    def _open(self) -> LLM:
        if self._llm is None:
            raise Closed("The engine is shutting down")
        return self._llm
