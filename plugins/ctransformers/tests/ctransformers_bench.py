"""A loaded backend, and ways to run jobs on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rbee.plugin import Cancelled, FinishReason, Loaded, ModelSpec, Sampling, Token
from rbee_ctransformers import Ctransformers, Tokens

GREEDY = Sampling(max_tokens=24, temperature=0)
PROMPTS = ("hello the queen", "hello", "日本語 é 🙂", "the bee " * 12, "1 2 3", "the queen", "x", "\n\n")


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
        self.backend = Ctransformers()
        self.loaded: Loaded = self.backend.load(spec, lambda _part: None)

    def tokens(self, text: str) -> list[int]:
        return self.backend.tokenize(text, special=True)

    def start(self, text: str, sampling: Sampling = GREEDY, cancelled: Cancelled = lambda: False) -> Tokens:
        return self.backend.generate(self.tokens(text), sampling, cancelled)

    def ask(self, prompt: str | Sequence[int], sampling: Sampling = GREEDY) -> Answer:
        """Run one job to its end."""
        ids = self.tokens(prompt) if isinstance(prompt, str) else prompt
        steps: list[Token] = []
        reason = drain(self.backend.generate(ids, sampling, lambda: False), steps)
        return Answer(b"".join(step.data for step in steps), tuple(step.id for step in steps), reason)

    def ask_together(self, jobs: Sequence[Callable[[], Answer]]) -> list[Answer | Exception]:
        """Start jobs at the same moment, each in its thread; return what each gave or raised."""
        barrier = threading.Barrier(len(jobs))

        def run(job: Callable[[], Answer]) -> Answer | Exception:
            barrier.wait(60)
            try:
                return job()
            except Exception as error:  # noqa: BLE001  the tests compare what was raised
                return error

        with ThreadPoolExecutor(len(jobs)) as pool:
            return list(pool.map(run, jobs))
