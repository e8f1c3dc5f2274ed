"""The network: llama's architecture in JAX, small enough to train on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of the network, in the terms of a GGUF header."""

    vocabulary: int
    width: int = 160
    layers: int = 4
    heads: int = 5
    hidden: int = 432
    context: int = 2048
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        """Numbers a head."""
        return self.width // self.heads


def init_params(shape: Shape, seed: int) -> Params:
    """Draw the starting weights; matrices are [out, in], as GGUF stores them."""
    keys = iter(jax.random.split(jax.random.PRNGKey(seed), 1 + 7 * shape.layers))
    width, hidden = shape.width, shape.hidden

    def matrix(rows: int, columns: int, scale: float = 1.0) -> jax.Array:
        drawn: jax.Array = jax.random.normal(next(keys), (rows, columns)) * (scale * columns**-0.5)
        return drawn

    into_residual = (2 * shape.layers) ** -0.5
    embedding = jax.random.normal(next(keys), (shape.vocabulary, width)) * 0.05
    layers = [
        {
            "attn_norm": jnp.ones(width),
            "attn_q": matrix(width, width),
            "attn_k": matrix(width, width),
            "attn_v": matrix(width, width),
            "attn_output": matrix(width, width, into_residual),
            "ffn_norm": jnp.ones(width),
            "ffn_gate": matrix(hidden, width),
            "ffn_up": matrix(hidden, width),
            "ffn_down": matrix(width, hidden, into_residual),
        }
        for _ in range(shape.layers)
    ]
    return {"token_embd": embedding, "layers": layers, "output_norm": jnp.ones(width)}


def logits(params: Params, shape: Shape, tokens: jax.Array) -> jax.Array:
    """Score the next token: [batch, time] of ids in, [batch, time, vocabulary] out. Pad on the right."""
    x = params["token_embd"][tokens]
    cos, sin = _rope_tables(shape, tokens.shape[1])
    for layer in params["layers"]:
        x = x + _attention(layer, shape, _norm(x, layer["attn_norm"], shape), cos, sin)
        x = x + _feed_forward(layer, _norm(x, layer["ffn_norm"], shape))
    scores: jax.Array = _norm(x, params["output_norm"], shape) @ params["token_embd"].T
    return scores


def loss(params: Params, shape: Shape, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean cross-entropy of `tokens[:, 1:]`, weighted a token by `weights[:, 1:]`."""
    scores = logits(params, shape, tokens[:, :-1])
    targets, weights = tokens[:, 1:], weights[:, 1:]
    chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    surprise = jax.nn.logsumexp(scores, axis=-1) - chosen
    mean: jax.Array = jnp.sum(surprise * weights) / jnp.maximum(jnp.sum(weights), 1.0)
    return mean


def _norm(x: jax.Array, gain: jax.Array, shape: Shape) -> jax.Array:
    scale: jax.Array = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + shape.norm_epsilon) * gain
    return x * scale


def _attention(layer: Params, shape: Shape, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    batch, time, width = x.shape

    def heads(matrix: jax.Array) -> jax.Array:
        return (x @ matrix.T).reshape(batch, time, shape.heads, shape.head_width).transpose(0, 2, 1, 3)

    query = _rotate(heads(layer["attn_q"]), cos, sin)
    key = _rotate(heads(layer["attn_k"]), cos, sin)
    scores = query @ key.transpose(0, 1, 3, 2) * shape.head_width**-0.5
    causal = jnp.tril(jnp.ones((time, time), dtype=bool))
    mixed = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1) @ heads(layer["attn_v"])
    output: jax.Array = mixed.transpose(0, 2, 1, 3).reshape(batch, time, width) @ layer["attn_output"].T
    return output


def _feed_forward(layer: Params, x: jax.Array) -> jax.Array:
    output: jax.Array = (jax.nn.silu(x @ layer["ffn_gate"].T) * (x @ layer["ffn_up"].T)) @ layer["ffn_down"].T
    return output


def _rope_tables(shape: Shape, time: int) -> tuple[jax.Array, jax.Array]:
    frequency = shape.rope_base ** (-jnp.arange(0, shape.head_width, 2) / shape.head_width)
    angle = jnp.arange(time)[:, None] * frequency[None, :]
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    # Pairs are neighbours (2i, 2i+1): llama's rope in GGUF, so the file needs no permutation.
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
