"""Jobs in turn: the same text, no harm from a neighbour, an end for each."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from functools import partial

import pytest
from ctransformers_bench import GREEDY, PROMPTS, Answer, Bench, drain

from rbee.plugin import Sampling

END = 256
"""The token that ends a text of the tiny model."""

SEEDED = Sampling(max_tokens=24, temperature=1.5, seed=3)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_eight_jobs_at_once_give_the_text_of_each_alone(bench: Bench, sampling: Sampling) -> None:
    alone = [bench.ask(prompt, sampling) for prompt in PROMPTS]
    assert bench.loaded.slots == 1
    assert bench.ask_together([partial(bench.ask, prompt, sampling) for prompt in PROMPTS * 2]) == alone * 2


def test_a_failing_job_does_not_touch_its_neighbours(bench: Bench) -> None:
    alone = [bench.ask(prompt) for prompt in PROMPTS[:3]]
    bad = [
        partial(bench.ask, [100_000]),
        partial(bench.ask, "x", replace(GREEDY, logit_bias={100_000: 1.0})),
        partial(bench.ask, "x", replace(GREEDY, json_schema={"type": "null"})),
    ]
    good = [partial(bench.ask, prompt) for prompt in PROMPTS[:3]]
    results = bench.ask_together([job for pair in zip(good, bad, strict=True) for job in pair])
    assert results[0::2] == alone
    assert [type(result) for result in results[1::2]] == [ValueError] * 3


def test_a_cancelled_job_frees_the_engine_for_the_next(bench: Bench) -> None:
    expected = bench.ask("hello")
    cancelled = threading.Event()
    job = bench.start("the queen", replace(GREEDY, max_tokens=None), cancelled.is_set)
    next(job)
    cancelled.set()
    assert drain(job) == "stop"
    assert bench.ask("hello") == expected


def test_closing_the_generator_frees_the_engine_for_the_next(bench: Bench) -> None:
    expected = bench.ask("hello")
    job = bench.start("the queen")
    next(job)
    job.close()
    assert bench.ask("hello") == expected


def test_a_job_cancelled_while_it_waits_ends(bench: Bench) -> None:
    running = bench.start("hello")
    next(running)
    assert drain(bench.start("hello", cancelled=lambda: True)) == "stop"
    assert next(running).id >= 0
    running.close()


def test_cancelling_stops_the_reading_of_a_prompt(bench: Bench) -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    expected = bench.ask("hello")
    steps: list[object] = []
    assert drain(bench.start("the " * 30, cancelled=cancelled), steps) == "stop"  # type: ignore[arg-type]
    assert (steps, asked) == ([], 3)
    assert bench.ask("hello") == expected


def test_a_continued_prompt_gives_the_text_of_a_fresh_engine(bench: Bench) -> None:
    prompt = bench.tokens("hello the queen")
    first = bench.ask(prompt)
    longer = [*prompt, *first.ids, *bench.tokens(" the")]
    continued = bench.ask(longer)
    bench.ask("something else")
    assert bench.ask(longer) == continued


def test_max_tokens_and_a_full_context_end_by_length(bench: Bench) -> None:
    endless = replace(GREEDY, max_tokens=None, logit_bias={END: -1000.0})
    prompt = bench.tokens("hello")
    full = bench.ask(prompt, endless)
    assert (len(prompt) + len(full.ids), full.reason) == (bench.loaded.context_tokens, "length")
    assert len(bench.ask(prompt, replace(endless, max_tokens=5)).ids) == 5
    assert bench.ask(prompt, replace(endless, max_tokens=0)) == Answer(b"", (), "length")


def test_the_end_token_ends_a_job_and_is_not_part_of_the_text(bench: Bench) -> None:
    assert bench.ask("hello", replace(GREEDY, logit_bias={END: 1000.0})) == Answer(b"", (), "stop")


def test_prompts_that_do_not_fit_are_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match=r"128 tokens.*127 at most"):
        bench.ask([5] * 128)
    assert len(bench.ask([5] * 127, replace(GREEDY, logit_bias={END: -1000.0})).ids) == 1
    with pytest.raises(ValueError, match="empty"):
        bench.ask("")
    with pytest.raises(ValueError, match="does not know"):
        bench.ask([-1])


def test_tokens_know_their_log_probability(bench: Bench) -> None:
    (token,) = list(bench.start("hello", replace(GREEDY, max_tokens=1)))
    assert token.logprob is not None
    assert -math.log(len(bench.tokens("x")) + 300) * 3 < token.logprob < 0


def test_closing_ends_a_running_job_with_an_error(bench: Bench) -> None:
    job = bench.start("hello", replace(GREEDY, max_tokens=None))
    next(job)
    bench.backend.close()
    with pytest.raises(RuntimeError, match="shutting down"):
        list(job)
    with pytest.raises(RuntimeError, match="shutting down"):
        bench.tokens("hello")
