"""Groups encoded examples of like length, so that little of a batch is padding."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from examples import Encoded

LENGTHS = (32, 48, 72, 104, 160, 256, 448, 768)
"""Padded lengths; each is compiled once."""

Batch = tuple[NDArray[np.int32], NDArray[np.float32]]


def endless_batches(pool: Sequence[Encoded], tokens_per_batch: int, rng: random.Random) -> Iterator[Batch]:
    """Go through `pool` again and again; examples longer than the last length are left out."""
    while True:
        yield from _one_pass(pool, tokens_per_batch, rng)


def _one_pass(pool: Sequence[Encoded], tokens_per_batch: int, rng: random.Random) -> Iterator[Batch]:
    waiting: dict[int, list[Encoded]] = {length: [] for length in LENGTHS}
    for encoded in rng.sample(list(pool), len(pool)):
        length = next((length for length in LENGTHS if len(encoded.tokens) <= length), None)
        if length is None:
            continue
        waiting[length].append(encoded)
        if len(waiting[length]) == tokens_per_batch // length // 2 * 2:
            yield _padded(waiting[length], length)
            waiting[length] = []


def _padded(examples: Sequence[Encoded], length: int) -> Batch:
    tokens = np.zeros((len(examples), length), np.int32)
    weights = np.zeros((len(examples), length), np.float32)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        weights[row, : len(example.weights)] = example.weights
    return tokens, weights
