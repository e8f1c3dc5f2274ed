"""Continuous batching: one thread that owns the context and moves every job by one token a step."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rbee.plugin import Cancelled, FinishReason, Token
from rbee_llama_cpp_python.batching import Piece, Reader, common_prefix, share


class Decoder(Protocol):
    """What the loop needs of a context; `context.Context` is the real one."""

    context_tokens: int

    def decode(self, pieces: Sequence[Piece]) -> int:
        """Run one batch; return 0 when it worked."""

    def keep(self, slot: int, tokens: int) -> bool:
        """Forget all of a slot but its first tokens; return False where that is impossible."""


class Chooser(Protocol):
    """What the loop needs of a job's sampler; `sampling.Sampler` is the real one."""

    def sample(self, output: int) -> int | None:
        """Choose the token after an output of the last batch; None ends the job."""

    def close(self) -> None:
        """Free what it holds."""


class Vocabulary(Protocol):
    """What the loop needs of a model; `model.Model` is the real one."""

    def ends(self, token: int) -> bool:
        """Tell whether a token ends the generation."""

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token adds."""


class DecodeFailed(RuntimeError):
    """llama.cpp could not compute a job's next token; the other jobs go on."""


@dataclass(eq=False)
class Job:
    """One generation, from the thread that asked for it to the decode thread and back by `results`."""

    prompt: Sequence[int]
    max_tokens: int | None
    sampler: Chooser
    cancelled: Cancelled
    abandoned: bool = False
    results: queue.SimpleQueue[Token | FinishReason | Exception] = field(default_factory=queue.SimpleQueue)

    def unwanted(self) -> bool:
        """Tell whether nobody waits for more; a `cancelled` that raises counts as yes."""
        try:
            return self.abandoned or self.cancelled()
        except Exception:  # noqa: BLE001  a caller's mistake must not stop the other jobs
            return True


@dataclass(eq=False)
class Slot:
    """One sequence of the context. `cached` is what its cache holds; `pending` is chosen but not decoded."""

    index: int
    cached: list[int] = field(default_factory=list)
    job: Job | None = None
    pending: int | None = None
    written: int = 0


class Engine:
    """Runs jobs in slots until closed.

    One decode thread owns the slots. State of a slot, and what moves it on:

    | state   | job | pending | a step gives it              | moves on when                                | to      |
    |---------|-----|---------|------------------------------|----------------------------------------------|---------|
    | idle    | no  | no      | nothing; its cache stays     | a job waits                                  | reading |
    | reading | yes | no      | a share of the prompt budget | the last prompt token is decoded             | writing |
    | writing | yes | yes     | its pending token            | end token, max_tokens, context full          | idle    |
    | any     | yes | any     | -                            | cancelled, or its decoding or sampling fails | idle    |

    Jobs beyond the slots wait in order. A batch that fails is run again one slot at a time, so that only the jobs
    that cannot go on end with an error.
    """

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        *,
        slots: int,
        batch_tokens: int,
        prompt_chunk_tokens: int,
        cache_prompt: bool = True,
    ) -> None:
        self._decoder = decoder
        self._vocabulary = vocabulary
        self._slots = [Slot(index) for index in range(slots)]
        self._batch_tokens = batch_tokens
        self._prompt_chunk_tokens = prompt_chunk_tokens
        self._cache_prompt = cache_prompt
        self._waiting: deque[Job] = deque()
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="llama-decode", daemon=True)
        self._thread.start()

    def generate(self, make_job: Callable[[], Job]) -> Generator[Token, None, FinishReason]:
        """Submit a job and yield its tokens; the generator's return value is the finish reason.

        Closing the generator ends the job. Raise what the decode thread found wrong with this job.
        """
        job = make_job()
        self._submit(job)
        try:
            while True:
                result = job.results.get()
                if isinstance(result, Token):
                    yield result
                elif isinstance(result, Exception):
                    raise result
                else:
                    return result
        finally:
            job.abandoned = True

    def close(self) -> None:
        """End every job with an error, stop the decode thread and wait for it."""
        with self._lock:
            self._closed = True
            self._inbox.put(None)
        self._thread.join()

    def _submit(self, job: Job) -> None:
        with self._lock:
            if self._closed:
                job.sampler.close()
                raise RuntimeError("The engine is shutting down")
            self._inbox.put(job)

    # Everything below runs in the decode thread.

    def _run(self) -> None:
        reason = RuntimeError("The engine is shutting down")
        try:
            while self._receive():
                self._step()
        except Exception as error:  # noqa: BLE001  whatever it is, the waiting threads must hear of it
            reason = RuntimeError(f"The decode thread failed: {error!r}")
        finally:
            self._end_all(reason)

    def _receive(self) -> bool:
        """Take in new jobs, waiting for one when there is nothing to do; return False to stop."""
        busy = bool(self._waiting) or any(slot.job for slot in self._slots)
        while True:
            try:
                job = self._inbox.get(block=not busy)
            except queue.Empty:
                return True
            if job is None:
                return False
            self._waiting.append(job)
            busy = True

    def _step(self) -> None:
        self._drop_unwanted()
        self._admit()
        pieces = self._plan()
        if pieces:
            self._decode(pieces)

    def _drop_unwanted(self) -> None:
        for job in [job for job in self._waiting if job.unwanted()]:
            self._waiting.remove(job)
            _finish(job, "stop")
        for slot in self._slots:
            if slot.job is not None and slot.job.unwanted():
                self._leave(slot, "stop")

    def _admit(self) -> None:
        """Give each waiting job the idle slot that knows most of its prompt."""
        idle = [slot for slot in self._slots if slot.job is None]
        while self._waiting and idle:
            job = self._waiting.popleft()
            # The last token of the prompt is always decoded: its logits choose the first token of the answer.
            reusable = job.prompt[:-1] if self._cache_prompt else ()
            slot = max(idle, key=lambda slot: (common_prefix(slot.cached, reusable), -len(slot.cached)))
            idle.remove(slot)
            known = common_prefix(slot.cached, reusable)
            if not self._decoder.keep(slot.index, known):
                self._decoder.keep(slot.index, 0)
                known = 0
            slot.cached = list(job.prompt[:known])
            slot.job, slot.pending, slot.written = job, None, 0

    def _plan(self) -> list[Piece]:
        writing: list[Piece] = []
        reading: list[Reader] = []
        for slot in self._slots:
            if slot.pending is not None:
                writing.append(Piece(slot.index, (slot.pending,), len(slot.cached), True))
            elif slot.job is not None:
                reading.append(Reader(slot.index, slot.job.prompt, len(slot.cached)))
        budget = self._prompt_chunk_tokens if writing else self._batch_tokens
        return writing + share(reading, min(budget, self._batch_tokens - len(writing)))

    def _decode(self, pieces: list[Piece]) -> None:
        code = self._decoder.decode(pieces)
        if code == 0:
            output = -1
            for piece in pieces:
                output += len(piece.tokens)
                self._advance(piece, output)
        elif len(pieces) > 1:
            for piece in pieces:
                if self._restore(piece):
                    self._decode([piece])
        else:
            hint = "no room in its cache" if code == 1 else f"llama_decode gave {code}"
            self._fail(self._slots[pieces[0].slot], DecodeFailed(f"The engine could not go on with this job: {hint}"))

    def _restore(self, piece: Piece) -> bool:
        """Take back what a failed batch may have left of a piece, before it is run again."""
        slot = self._slots[piece.slot]
        if self._decoder.keep(slot.index, piece.position):
            return True
        self._fail(slot, DecodeFailed("The engine could not go on with this job: its cache cannot be taken back"))
        return False

    def _advance(self, piece: Piece, output: int) -> None:
        """Record that a piece is decoded, and choose the next token where its output was wanted."""
        slot = self._slots[piece.slot]
        slot.cached.extend(piece.tokens)
        if slot.job is None or not piece.output:
            return
        try:
            token = slot.job.sampler.sample(output)
        except Exception as error:  # noqa: BLE001  one job's sampler must not stop the other jobs
            self._fail(slot, error)
            return
        if token is None or self._vocabulary.ends(token):
            self._leave(slot, "stop")
            return
        slot.pending = token
        slot.written += 1
        slot.job.results.put(Token(self._vocabulary.piece(token), token))
        if slot.written == slot.job.max_tokens or len(slot.cached) + 1 >= self._decoder.context_tokens:
            self._leave(slot, "length")

    def _fail(self, slot: Slot, error: Exception) -> None:
        """End a job with an error and forget its cache, whose state nobody can vouch for."""
        self._decoder.keep(slot.index, 0)
        slot.cached = []
        self._leave(slot, error)

    def _leave(self, slot: Slot, result: FinishReason | Exception) -> None:
        job, slot.job, slot.pending = slot.job, None, None
        if job is not None:
            _finish(job, result)

    def _end_all(self, reason: Exception) -> None:
        with self._lock:
            self._closed = True
        while True:
            try:
                job = self._inbox.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                self._waiting.append(job)
        for slot in self._slots:
            self._leave(slot, reason)
        while self._waiting:
            _finish(self._waiting.popleft(), reason)


def _finish(job: Job, result: FinishReason | Exception) -> None:
    job.sampler.close()
    job.results.put(result)
