"""A real engine with the built-in model, and ways to run jobs on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import rbee
from rbee.plugin import FinishReason, Loaded, ModelSpec, Sampling, Token
from rbee_llama_cpp_python import LlamaCppPython, Tokens

T = TypeVar("T")

DEMO = Path(rbee.__file__).parent / "models" / "rbee-demo.gguf"
GREEDY = Sampling(max_tokens=48, temperature=0)
# What the model is sure of: llama.cpp rounds a step of one token and a batch a little differently, and between two
# tokens that are as likely as each other that decides.
PROMPTS = (
    "<|user|>How do I add a machine?<|assistant|>",
    "<|user|>What is a hive?<|assistant|>",
    "Hello",
    "rbee apply inventory/",
    "<|user|>Wie füge ich einen Rechner hinzu? 日本語 🙂<|assistant|>",
    "The queen reads the inventory, and then " * 20,
    "<|user|>Which port does the queen use?<|assistant|>",
    "<|user|>how do i route jobs<|assistant|>",
)


@dataclass(frozen=True)
class Answer:
    """What one job gave: its bytes, its token ids and why it ended."""

    data: bytes
    ids: tuple[int, ...]
    reason: FinishReason


def drain(job: Tokens, steps: list[Token] | None = None) -> FinishReason:
    """Run a job to its end; return why it ended."""
    while True:
        try:
            step = next(job)
        except StopIteration as end:
            reason: FinishReason = end.value
            return reason
        if steps is not None:
            steps.append(step)


class Bench:
    """A loaded backend."""

    def __init__(self, spec: ModelSpec) -> None:
        self.backend = LlamaCppPython()
        try:
            self.loaded: Loaded = self.backend.load(spec, lambda _part: None)
        except BaseException:
            self.backend.close()
            raise

    def tokens(self, text: str) -> list[int]:
        return self.backend.tokenize(text, special=True)

    def ask(self, prompt: str | Sequence[int], sampling: Sampling = GREEDY) -> Answer:
        """Run one job to its end."""
        ids = self.tokens(prompt) if isinstance(prompt, str) else prompt
        job = self.backend.generate(ids, sampling, lambda: False)
        steps: list[Token] = []
        reason = drain(job, steps)
        return Answer(b"".join(step.data for step in steps), tuple(step.id for step in steps), reason)

    def ask_together(self, jobs: Sequence[Callable[[], T]]) -> list[T | Exception]:
        """Start jobs at the same moment, each in its thread; return what each gave or raised."""
        barrier = threading.Barrier(len(jobs))

        def run(job: Callable[[], T]) -> T | Exception:
            barrier.wait(60)
            try:
                return job()
            except Exception as error:  # noqa: BLE001  the tests compare what was raised
                return error

        with ThreadPoolExecutor(len(jobs)) as pool:
            return list(pool.map(run, jobs))

    def endless(self, max_tokens: int | None = None) -> Sampling:
        """Settings with which this model never stops by itself."""
        model = self.backend._loaded()
        ends = {token: -1000.0 for token in range(model.vocabulary_tokens) if model.ends(token)}
        return replace(GREEDY, max_tokens=max_tokens, logit_bias=ends)


def open_bench(**changes: object) -> Bench:
    """Load the built-in model with changes to the spec."""
    spec = ModelSpec("rbee-demo", DEMO, format="gguf", context_tokens=512, slots=8)
    return Bench(replace(spec, **changes))  # type: ignore[arg-type]  # a test's own changes
