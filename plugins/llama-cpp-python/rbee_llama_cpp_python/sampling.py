"""How one job chooses its next token: a chain of llama.cpp's samplers, and a grammar for JSON schemas."""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Sequence

import llama_cpp.llama_cpp as api
import numpy as np

from rbee.plugin import Sampling
from rbee_llama_cpp_python.context import Context, logits
from rbee_llama_cpp_python.grammar import schema_grammar
from rbee_llama_cpp_python.model import EngineError, Model

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""`llama_token_data` of llama.h."""


class Sampler:
    """The samplers of one job. Only the decode thread calls `sample`; `close` may come more than once."""

    def __init__(self, model: Model, context: Context, sampling: Sampling, prompt: Sequence[int], last: int) -> None:
        """Build the chain; `last` is how many tokens the penalties look back. Raise ValueError for a bad setting."""
        check(sampling, model.vocabulary_tokens)
        grammar = schema_grammar(sampling.json_schema) if sampling.json_schema is not None else None
        self._model = model
        self._context = context
        self._chain: api.llama_sampler_p | None = _chain(model, sampling, last)
        self._grammar: api.llama_sampler_p | None = None
        if grammar is not None:
            self._grammar = api.llama_sampler_init_grammar(model.vocab, grammar.encode(), b"root")
            if not self._grammar:
                self.close()
                raise ValueError("This JSON schema cannot be enforced: llama.cpp refuses its grammar")
        for token in prompt[-last:] if last else ():
            api.llama_sampler_accept(self._chain, token)

    def sample(self, output: int) -> int | None:
        """Choose the token after an output of the last batch; None when a grammar leaves none, and none is needed."""
        if self._chain is None:
            raise EngineError("The sampler is closed")
        if self._grammar is None:
            return int(api.llama_sampler_sample(self._chain, self._context.pointer, output))
        token = self._choose(output, grammar=False)
        if token is None or not self._allows(token):
            token = self._choose(output, grammar=True)
        if token is not None:
            api.llama_sampler_accept(self._chain, token)
            api.llama_sampler_accept(self._grammar, token)
        return token

    def close(self) -> None:
        """Free the samplers."""
        chain, self._chain = self._chain, None
        grammar, self._grammar = self._grammar, None
        for sampler in (chain, grammar):
            if sampler:
                api.llama_sampler_free(sampler)

    def _choose(self, output: int, *, grammar: bool) -> int | None:
        """Run the chain over all tokens, or over those that the grammar allows.

        The grammar is asked about one token first, and about all only when that one is refused: asking about all
        costs more than the rest of the sampling. A token that it refuses must never be accepted: llama.cpp aborts.
        """
        count = self._model.vocabulary_tokens
        data = np.empty(count, _TOKEN_DATA)
        data["id"] = np.arange(count, dtype=np.int32)
        data["logit"] = logits(self._context, output, count)
        data["p"] = 0
        candidates = _candidates(data)
        if grammar:
            api.llama_sampler_apply(self._grammar, candidates)
            if not np.isfinite(data["logit"]).any():
                if self._model.eos() < 0:
                    return None
                raise EngineError("No token of this model continues the JSON that the schema asks for")
        api.llama_sampler_apply(self._chain, candidates)
        if not 0 <= candidates.selected < candidates.size:
            raise EngineError("llama.cpp chose no token")
        return int(candidates.data[candidates.selected].id)

    def _allows(self, token: int) -> bool:
        data = np.array([(token, 1.0, 0.0)], _TOKEN_DATA)
        api.llama_sampler_apply(self._grammar, _candidates(data))
        return bool(np.isfinite(data["logit"][0]))


def check(sampling: Sampling, vocabulary_tokens: int) -> None:
    """Raise ValueError naming the first setting that the engine cannot take."""
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


def _chain(model: Model, sampling: Sampling, last: int) -> api.llama_sampler_p:
    """Build the chain in the order of llama.cpp's own server; temperature 0 is greedy."""
    chain: api.llama_sampler_p = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    steps = []
    if sampling.logit_bias:
        steps.append(_logit_bias(model, sampling))
    if sampling.repeat_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0:
        penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        steps.append(api.llama_sampler_init_penalties(model.vocabulary_tokens, last, *penalties))
    if sampling.temperature == 0:
        steps.append(api.llama_sampler_init_greedy())
    else:
        if sampling.top_k > 0:
            steps.append(api.llama_sampler_init_top_k(min(sampling.top_k, model.vocabulary_tokens)))
        if sampling.top_p < 1:
            steps.append(api.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            steps.append(api.llama_sampler_init_min_p(sampling.min_p, 1))
        steps.append(api.llama_sampler_init_temp(sampling.temperature))
        steps.append(api.llama_sampler_init_dist(_seed(sampling.seed)))
    for step in steps:
        api.llama_sampler_chain_add(chain, step)
    return chain


def _logit_bias(model: Model, sampling: Sampling) -> api.llama_sampler_p:
    biases = (api.llama_logit_bias * len(sampling.logit_bias))(
        *(api.llama_logit_bias(token, bias) for token, bias in sampling.logit_bias.items())
    )
    sampler: api.llama_sampler_p = api.llama_sampler_init_logit_bias(model.vocabulary_tokens, len(biases), biases)
    return sampler


def _seed(seed: int | None) -> int:
    """Return a seed of 32 bits; LLAMA_DEFAULT_SEED would mean a random one, so it stands for its neighbour."""
    value = random.SystemRandom().getrandbits(32) if seed is None else seed & 0xFFFFFFFF
    return value - 1 if value == api.LLAMA_DEFAULT_SEED else value


def _candidates(data: np.ndarray[tuple[int], np.dtype[np.void]]) -> api.llama_token_data_array:
    pointer = ctypes.cast(data.ctypes.data, api.llama_token_data_p)
    return api.llama_token_data_array(pointer, len(data), -1, False)
