"""Trains rbee's built-in demo model from scratch and writes it as GGUF.

    python train.py --out ../../rbee/models/rbee-demo.gguf --work /tmp/demo-model

A run can be split: what is learned is kept in the work folder, and `--resume` goes on from there.
"""

from __future__ import annotations

import argparse
import pickle
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import devices  # isort: skip - before JAX
import jax
import numpy as np
import optax  # type: ignore[import-untyped]  # the package has no types
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from batches import Batch, endless_batches
from corpus import Corpus, vocabulary_texts
from examples import Encoded, encode
from gguf_file import padded_vocabulary, write_gguf
from network import Params, Shape, init_params, loss
from tokens import Vocabulary, learn_vocabulary

_PIECES = 1700
_SPACED_WORDS = 500
_TOKENS_PER_BATCH = 3_072
_SEED = 7833


@dataclass(frozen=True)
class Plan:
    """One run of the trainer, in steps counted over all resumed runs."""

    out: Path
    work: Path
    first_step: int
    last_step: int
    total_steps: int
    examples: int
    peak_rate: float


def main() -> None:
    """Learn the tokenizer if there is none, train, write the file."""
    plan = _parse_arguments()
    plan.work.mkdir(parents=True, exist_ok=True)
    corpus = Corpus()
    vocabulary = _vocabulary(corpus, plan.work / "vocabulary.json")
    shape = Shape(vocabulary=padded_vocabulary(vocabulary))
    params, state = _restore(plan, shape)
    batches = endless_batches(_pool(corpus, vocabulary, plan), _TOKENS_PER_BATCH, random.Random(plan.first_step))
    params, state = train(params, state, shape, batches, plan)
    (plan.work / "state.pickle").write_bytes(pickle.dumps(jax.device_get((plan.last_step, params, state))))
    write_gguf(plan.out, params, shape, vocabulary)
    print(f"{plan.out}: {plan.out.stat().st_size} bytes, {_count(params)} parameters")


def train(params: Params, state: Any, shape: Shape, batches: Iterator[Batch], plan: Plan) -> tuple[Params, Any]:
    """Run the steps of `plan`, printing a smoothed loss now and then."""
    optimizer = _optimizer(plan)
    mesh = jax.make_mesh((devices.COUNT,), ("batch",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("batch"))  # type: ignore[no-untyped-call]
    everywhere = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]
    params, state = jax.device_put((params, state), everywhere)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, tokens: jax.Array, weights: jax.Array) -> tuple[Params, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, shape, tokens, weights)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    smooth, seen, started = 0.0, 0, time.monotonic()
    for number in range(plan.first_step, plan.last_step):
        tokens, weights = jax.device_put(next(batches), spread)
        params, state, value = step(params, state, tokens, weights)
        smooth = float(value) if number == plan.first_step else 0.97 * smooth + 0.03 * float(value)
        seen += tokens.size
        if (number + 1) % 50 == 0:
            rate = seen / (time.monotonic() - started)
            print(f"step {number + 1}/{plan.total_steps}  loss {smooth:.4f}  {rate:.0f} tokens/s", flush=True)
    return params, state


def _optimizer(plan: Plan) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, plan.peak_rate, 100, plan.total_steps, plan.peak_rate * 0.02)
    # Muon learns more a step, but its orthogonalisation costs as much as the whole gradient at this size.
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))


def _restore(plan: Plan, shape: Shape) -> tuple[Params, Any]:
    if plan.first_step:
        _, params, state = pickle.loads((plan.work / "state.pickle").read_bytes())  # our own file
        return params, state
    params = init_params(shape, _SEED)
    return params, _optimizer(plan).init(params)


def _vocabulary(corpus: Corpus, path: Path) -> Vocabulary:
    if not path.exists():
        texts = vocabulary_texts(corpus, random.Random(_SEED))
        learn_vocabulary(texts, pieces=_PIECES, spaced_words=_SPACED_WORDS).save(path)
    return Vocabulary.load(path)


def _pool(corpus: Corpus, vocabulary: Vocabulary, plan: Plan) -> list[Encoded]:
    rng = random.Random(_SEED + plan.first_step)
    tokenizer = vocabulary.tokenizer()
    pool = [encode(corpus.example(rng), tokenizer) for _ in range(plan.examples)]
    print(f"{len(pool)} examples, {sum(len(encoded.tokens) for encoded in pool)} tokens", flush=True)
    return pool


def _count(params: Params) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree_util.tree_leaves(params))


def _parse_arguments() -> Plan:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the GGUF file to write")
    parser.add_argument("--work", type=Path, required=True, help="folder for the tokenizer and the training state")
    parser.add_argument("--total-steps", type=int, default=2000, help="length of the whole schedule")
    parser.add_argument("--steps", type=int, help="steps of this run (default: up to the end)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in the work folder")
    parser.add_argument("--examples", type=int, default=60_000, help="examples drawn for this run")
    parser.add_argument("--peak-rate", type=float, default=0.003, help="highest learning rate")
    chosen = parser.parse_args()
    first = pickle.loads((chosen.work / "state.pickle").read_bytes())[0] if chosen.resume else 0
    last = min(chosen.total_steps, first + (chosen.steps or chosen.total_steps))
    return Plan(chosen.out, chosen.work, first, last, chosen.total_steps, chosen.examples, chosen.peak_rate)


if __name__ == "__main__":
    main()
