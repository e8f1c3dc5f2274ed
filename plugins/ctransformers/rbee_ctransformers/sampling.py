"""Choosing a token from logits.

The engine's own sampler makes a new random generator for every token from the same seed (or from the clock's second),
reads past its arrays when top_k is larger than the vocabulary, and has no min_p, logit_bias or penalties by count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rbee.plugin import Sampling

PENALTY_TOKENS = 64
"""How many last tokens the penalties look at."""

Logits = NDArray[np.float64]


def check(sampling: Sampling, vocabulary_tokens: int) -> None:
    """Raise ValueError naming the first setting that cannot be taken."""
    if sampling.json_schema is not None:
        raise ValueError("json_schema: this engine cannot hold a model to a schema")
    for name in ("temperature", "top_p", "min_p", "repeat_penalty"):
        value = getattr(sampling, name)
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be a number of at least 0, not {value}")
    if sampling.repeat_penalty == 0:
        raise ValueError("repeat_penalty must be above 0")
    for name in ("presence_penalty", "frequency_penalty"):
        if not math.isfinite(getattr(sampling, name)):
            raise ValueError(f"{name} must be a number")
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < vocabulary_tokens:
            raise ValueError(f"logit_bias: the model has no token {token}")
        if not math.isfinite(bias):
            raise ValueError(f"logit_bias: the bias of token {token} must be a number")


def choose(logits: Logits, sampling: Sampling, recent: Sequence[int], random: np.random.Generator) -> int:
    """Return a token id; temperature 0 takes the likeliest. Steps in the order of llama.cpp's samplers.

    `logits` is changed in place; `recent` are the last tokens of prompt and answer.
    """
    _adjust(logits, sampling, recent)
    if sampling.temperature == 0:
        return int(logits.argmax())
    ids = _likeliest(logits, sampling.top_k)
    kept = logits[ids]
    shares = _softmax(kept)
    if sampling.top_p < 1:
        kept = kept[: int(np.searchsorted(np.cumsum(shares), sampling.top_p)) + 1]
    if sampling.min_p > 0:
        kept = kept[shares[: len(kept)] >= min(sampling.min_p, 1.0) * shares[0]]
    totals = np.cumsum(_softmax(kept / sampling.temperature))
    drawn = int(np.searchsorted(totals, random.random() * totals[-1], side="right"))
    return int(ids[min(drawn, len(kept) - 1)])


def log_probability(logits: Logits, token: int) -> float:
    """Return the natural logarithm of a token's probability under the model alone."""
    top = logits.max()
    return float(logits[token] - top - math.log(np.exp(logits - top).sum()))


def _adjust(logits: Logits, sampling: Sampling, recent: Sequence[int]) -> None:
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    if sampling.repeat_penalty == 1 and sampling.frequency_penalty == 0 and sampling.presence_penalty == 0:
        return
    for token, count in Counter(recent).items():
        value = logits[token]
        value = value / sampling.repeat_penalty if value > 0 else value * sampling.repeat_penalty
        logits[token] = value - count * sampling.frequency_penalty - sampling.presence_penalty


def _likeliest(logits: Logits, count: int) -> NDArray[np.intp]:
    """Return the ids of the `count` highest logits, highest first; 0 means all."""
    if 0 < count < len(logits):
        ids = np.argpartition(-logits, count - 1)[:count]
        return ids[np.argsort(-logits[ids], kind="stable")]
    return np.argsort(-logits, kind="stable")


def _softmax(values: Logits) -> Logits:
    weights = np.exp(values - values.max())
    return np.asarray(weights / weights.sum(), dtype=np.float64)
