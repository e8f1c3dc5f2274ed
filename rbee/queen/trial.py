"""Call a script's functions with made-up jobs and workers, to find what fails only when it runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from rbee.errors import InvalidScript, Refused
from rbee.queen.job import BYTES_A_TOKEN, TYPES, new_id
from rbee.queen.places import Candidate
from rbee.queen.policy import MEANT
from rbee.queen.script import ADMITS, Compiled, admits, decide, freeze
from rbee.queen.view import Place, record
from rbee.wire.fleet import EngineReport, ModelReport
from rbee.wire.scheduler import ExplainJob

MODELS = ("llama-3-8b", "llama-3-70b", "sdxl")
TIERS = ("", "enterprise")


def trials(compiled: Compiled) -> Iterator[str]:
    """Yield what fails: for jobs of every type and priority, with no, one and two workers."""
    shelves = [freeze([]), freeze([place(0)]), freeze([place(0), place(1)])]
    for capability, priority, model, tier in itertools.product(TYPES, MEANT, MODELS, TIERS):
        task = described(ExplainJob(model=model, priority=priority, customer_tier=tier), capability)
        try:
            if ADMITS in compiled.functions:
                for depth in (0, 1000):
                    _admitted(compiled, task, depth)
            if compiled.route:
                for workers in shelves:
                    decide(compiled, task, workers)
        except InvalidScript as problem:
            yield problem.message


def place(number: int) -> dict[str, object]:
    """Return a worker that is made up."""
    engine = EngineReport(name="xllamacpp")
    return record(Place(Candidate(f"box-{number}", ModelReport(name="m"), engine), None, None), "text-gen")


def described(wanted: ExplainJob, capability: str) -> dict[str, Any]:
    """Return the facts of a job that is only described, as a script sees those of a real one."""
    return {
        "id": new_id(),
        "type": TYPES[capability],
        "capability": capability,
        "model": wanted.model,
        "priority": wanted.priority,
        "customer_tier": wanted.customer_tier,
        "tenant": wanted.tenant,
        "key": wanted.key,
        "tags": wanted.tags,
        "metadata": wanted.metadata,
        "prompt_bytes": wanted.prompt_tokens * BYTES_A_TOKEN,
        "prompt_tokens": wanted.prompt_tokens,
        "max_tokens": wanted.max_tokens,
        "max_bytes": wanted.max_tokens * BYTES_A_TOKEN,
        "stream": wanted.stream,
        "age_s": 0.0,
        "attempts": 1,
        "region": wanted.region,
    }


def capability_of(word: str) -> str | None:
    """Return the capability that a word names: its own name, or a script's type."""
    return next((name for name, kind in TYPES.items() if word in (name, kind)), None)


def _admitted(compiled: Compiled, task: Mapping[str, Any], depth: int) -> None:
    try:
        admits(compiled, task, depth)
    except Refused:
        return
