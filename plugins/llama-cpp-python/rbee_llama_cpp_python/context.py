"""Contexts of llama.cpp, one that generates and one that embeds, and the batches they run.

Close a context before its model: llama.cpp keeps plain pointers between them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import llama_cpp.llama_cpp as api
import numpy as np
from numpy.typing import NDArray

from rbee_llama_cpp_python.batching import Piece
from rbee_llama_cpp_python.model import LOG_LINES, EngineError, Model, last_words
from rbee_llama_cpp_python.settings import DEFAULT_CONTEXT_TOKENS, Settings


class Context:
    """A `llama_context` with one sequence for each slot, each with room for `context_tokens`."""

    def __init__(self, model: Model, settings: Settings) -> None:
        """Make a context for generating; raise EngineError when memory or settings do not allow it."""
        wanted = settings.context_tokens or DEFAULT_CONTEXT_TOKENS
        per_slot = min(wanted, model.trained_context_tokens) if model.trained_context_tokens > 0 else wanted
        params = _context_params(settings)
        params.n_ctx = per_slot * settings.slots
        params.n_batch = settings.batch_tokens
        params.n_ubatch = settings.batch_tokens
        params.n_seq_max = settings.slots
        # Only the last token of a piece has logits; without this the buffers hold a row for every token of a batch.
        params.n_outputs_max = settings.slots
        # A cache of its own for each slot: no job can use up another's room, and attention reads its own tokens only.
        params.kv_unified = False
        self._pointer: int | None = _new_context(model, params)
        self._memory = api.llama_get_memory(self._pointer)
        self.context_tokens = min(per_slot, int(api.llama_n_ctx_seq(self._pointer)))
        self.batch = Batch(settings.batch_tokens, settings.slots)

    @property
    def pointer(self) -> int:
        """The `llama_context *`; raise EngineError when the context is closed."""
        if not self._pointer:
            raise EngineError("The context is closed")
        return self._pointer

    def decode(self, pieces: Sequence[Piece]) -> int:
        """Run one batch; return llama_decode's code: 0 good, 1 no room, 2 aborted, negative an error (llama.h)."""
        return int(api.llama_decode(self.pointer, self.batch.fill(pieces)))

    def keep(self, slot: int, tokens: int) -> bool:
        """Forget all of a slot but its first tokens; return False where the model's memory cannot go back."""
        if not api.llama_memory_seq_rm(self._memory, slot, tokens, -1):
            return False
        # With sliding-window attention the positions before the window may be gone although the removal worked.
        return tokens == 0 or int(api.llama_memory_seq_pos_min(self._memory, slot)) <= 0

    def close(self) -> None:
        """Free the context and its cache."""
        pointer, self._pointer = self._pointer, None
        if pointer:
            api.llama_free(pointer)


class EmbeddingContext:
    """A `llama_context` that pools each sequence into one vector."""

    def __init__(self, model: Model, settings: Settings, pooling: int) -> None:
        """Make a context for embeddings. The physical batch is as large as the context: an input must fit into one."""
        wanted = settings.context_tokens or DEFAULT_CONTEXT_TOKENS
        tokens = min(wanted, model.trained_context_tokens) if model.trained_context_tokens > 0 else wanted
        params = _context_params(settings)
        params.n_ctx = params.n_batch = params.n_ubatch = tokens
        params.n_seq_max = settings.slots
        params.kv_unified = True
        params.embeddings = True
        params.pooling_type = pooling
        self._pointer: int | None = _new_context(model, params)
        self._memory = api.llama_get_memory(self._pointer)
        self._width = model.embedding_width
        self.context_tokens = tokens
        self.sequences = settings.slots
        self.batch = Batch(tokens, settings.slots)

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return one vector of length 1 per input; at most `sequences` inputs, together `context_tokens` at most."""
        if not self._pointer:
            raise EngineError("The context is closed")
        if self._memory:
            api.llama_memory_clear(self._memory, True)
        batch = self.batch.fill([Piece(slot, tokens, 0, True) for slot, tokens in enumerate(inputs)], every_output=True)
        run = api.llama_decode if self._memory else api.llama_encode
        code = int(run(self._pointer, batch))
        if code != 0:
            raise EngineError(f"llama.cpp could not embed {len(inputs)} inputs (code {code}): {last_words()}")
        return [self._vector(slot) for slot in range(len(inputs))]

    def _vector(self, slot: int) -> list[float]:
        row = api.llama_get_embeddings_seq(self._pointer, slot)
        if not row:
            raise EngineError("llama.cpp pooled no embedding for an input")
        values = np.ctypeslib.as_array(row, shape=(self._width,)).astype(np.float64)
        length = float(np.linalg.norm(values))
        return [float(value) for value in (values / length if length > 0 else values)]

    def close(self) -> None:
        """Free the context."""
        pointer, self._pointer = self._pointer, None
        if pointer:
            api.llama_free(pointer)


class Batch:
    """The arrays of a `llama_batch`, owned by Python, so that nothing has to be freed."""

    def __init__(self, capacity: int, slots: int) -> None:
        self._tokens = (api.llama_token * capacity)()
        self._positions = (api.llama_pos * capacity)()
        self._counts = (ctypes.c_int32 * capacity)(*([1] * capacity))
        self._ids = [(api.llama_seq_id * 1)(slot) for slot in range(slots)]
        pointer = ctypes.POINTER(api.llama_seq_id)
        self._id_pointers = [ctypes.cast(one, pointer) for one in self._ids]
        self._sequences = (pointer * capacity)()
        self._outputs = (ctypes.c_int8 * capacity)()
        self._batch = api.llama_batch(
            0, self._tokens, None, self._positions, self._counts, self._sequences, self._outputs
        )

    def fill(self, pieces: Sequence[Piece], *, every_output: bool = False) -> api.llama_batch:
        """Lay pieces one after the other; the last token of each has an output if its piece wants one."""
        at = 0
        for piece in pieces:
            count = len(piece.tokens)
            end = at + count
            self._tokens[at:end] = list(piece.tokens)
            self._positions[at:end] = list(range(piece.position, piece.position + count))
            self._sequences[at:end] = [self._id_pointers[piece.slot]] * count
            self._outputs[at:end] = [int(every_output)] * count
            self._outputs[end - 1] = int(piece.output)
            at = end
        self._batch.n_tokens = at
        return self._batch


def logits(context: Context, output: int, count: int) -> NDArray[np.float32]:
    """Return the logits at an output of the last batch, as a view that the next decode overwrites."""
    row = api.llama_get_logits_ith(context.pointer, output)
    if not row:
        raise EngineError("llama.cpp has no logits for this token")
    return np.ctypeslib.as_array(row, shape=(count,))


def _new_context(model: Model, params: api.llama_context_params) -> int:
    LOG_LINES.clear()
    pointer = api.llama_init_from_model(model.pointer, params)
    if not pointer:
        raise EngineError(
            f"llama.cpp cannot make a context of {params.n_ctx} tokens: {last_words()}. "
            "Try: a smaller ctx or fewer slots"
        )
    return int(pointer)


def _context_params(settings: Settings) -> api.llama_context_params:
    params: api.llama_context_params = api.llama_context_default_params()
    params.n_threads = settings.threads
    params.n_threads_batch = settings.threads
    params.flash_attn_type = settings.flash_attention
    params.type_k = settings.key_type
    params.type_v = settings.value_type
    params.offload_kqv = bool(settings.gpus)
    params.op_offload = bool(settings.gpus)
    return params
