"""How long a context a worker gives when nobody said: what the model was made for, as far as memory goes."""

from __future__ import annotations

import os

SMALLEST_TOKENS = 2048
LARGEST_TOKENS = 16_384
MEMORY_SHARE = 1 / 8
STEP_TOKENS = 256
USUAL_SLOTS = 4


def default_context(trained_tokens: int, bytes_per_token: int, slots: int, memory_bytes: int) -> int:
    """Return a context in tokens such that all slots' contexts together take an eighth of the machine's memory.

    Never more than the model was trained for, never less than 2048 where it was; 0 where the file does not tell.
    The machine's whole memory counts, not what is free: the same model must not change its context from day to day.
    """
    if not trained_tokens:
        return 0
    fitting = LARGEST_TOKENS
    if bytes_per_token:
        fitting = int(memory_bytes * MEMORY_SHARE) // (bytes_per_token * max(1, slots))
    rounded = fitting // STEP_TOKENS * STEP_TOKENS
    return min(trained_tokens, max(SMALLEST_TOKENS, min(rounded, LARGEST_TOKENS)))


def machine_memory_bytes() -> int:
    """Return the memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
