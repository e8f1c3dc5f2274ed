"""Jobs beside each other: the same text, no harm from a neighbour, fair turns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from llama_bench import GREEDY, PROMPTS, Answer, Bench, drain


def test_eight_jobs_at_once_give_the_text_of_each_alone(bench: Bench) -> None:
    """Greedy only: llama.cpp rounds otherwise in a batch than alone, and a draw may fall between the two."""
    alone = [bench.ask(prompt) for prompt in PROMPTS]
    assert bench.loaded.slots == len(PROMPTS)
    for _round in range(3):
        assert bench.ask_together([partial(bench.ask, prompt) for prompt in PROMPTS]) == alone


def test_a_job_s_settings_are_its_own(bench: Bench) -> None:
    token = bench.tokens("x")[-1]
    forced = replace(GREEDY, logit_bias={token: 1000.0})
    hot = replace(bench.endless(max_tokens=40), temperature=5.0, frequency_penalty=1.0)
    plain = [bench.ask(prompt) for prompt in PROMPTS[:3]]
    jobs = [(prompt, settings) for prompt in PROMPTS[:3] for settings in (GREEDY, forced, hot)][:8]
    results = bench.ask_together([partial(bench.ask, prompt, settings) for prompt, settings in jobs])
    assert results[0::3] == plain
    assert all(isinstance(result, Answer) and set(result.ids) == {token} for result in results[1::3])


def test_more_jobs_than_slots_wait_and_lose_nothing(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=3)
    alone = [bench.ask(prompt) for prompt in PROMPTS]
    assert bench.ask_together([partial(bench.ask, prompt) for prompt in PROMPTS * 2]) == alone * 2


def test_a_failing_job_does_not_touch_its_neighbours(bench: Bench) -> None:
    alone = [bench.ask(prompt) for prompt in PROMPTS[:4]]
    bad: list[Callable[[], Answer]] = [
        partial(bench.ask, [5, 10_000_000]),
        partial(bench.ask, [-1]),
        partial(bench.ask, "x", replace(GREEDY, logit_bias={10_000_000: 1.0})),
        partial(bench.ask, "x", replace(GREEDY, json_schema={"type": "no such type"})),
    ]
    good = [partial(bench.ask, prompt) for prompt in PROMPTS[:4]]
    results = bench.ask_together([job for pair in zip(good, bad, strict=True) for job in pair])
    assert results[0::2] == alone
    assert [type(result) for result in results[1::2]] == [ValueError] * 4


def test_a_long_prompt_does_not_stop_a_stream(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(context_tokens=2048, slots=2, options={"prompt_chunk": "16"})
    long_prompt = (bench.tokens("word after word ") * 2000)[:1200]
    stream = bench.backend.generate(bench.tokens("Hello"), bench.endless(), lambda: False)
    next(stream)
    written = 1
    with_long_prompt = threading.Thread(target=bench.ask, args=(long_prompt, replace(GREEDY, max_tokens=1)))
    with_long_prompt.start()
    while with_long_prompt.is_alive():
        next(stream)
        written += 1
    stream.close()
    assert written > 1200 // 16


def test_a_cancelled_job_frees_its_slot_for_the_next(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=1)
    expected = bench.ask(PROMPTS[0])
    cancelled = threading.Event()
    job = bench.backend.generate(bench.tokens("Hello"), bench.endless(), cancelled.is_set)
    for _step in range(3):
        next(job)
    cancelled.set()
    assert drain(job) == "stop"
    assert bench.ask(PROMPTS[0]) == expected


def test_closing_the_generator_frees_the_slot(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=1)
    expected = bench.ask(PROMPTS[0])
    job = bench.backend.generate(bench.tokens("Hello"), bench.endless(), lambda: False)
    next(job)
    job.close()
    assert bench.ask(PROMPTS[0]) == expected


def test_a_job_cancelled_while_it_waits_never_runs(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=1)
    running = bench.backend.generate(bench.tokens("Hello"), bench.endless(), lambda: False)
    next(running)
    waiting = bench.backend.generate(bench.tokens("Hello"), bench.endless(), lambda: True)
    assert drain(waiting) == "stop"
    assert next(running).id >= 0
    running.close()


def test_a_cancel_check_that_raises_ends_only_its_own_job(bench: Bench) -> None:
    def broken() -> bool:
        raise OSError("the connection is gone")

    expected = bench.ask(PROMPTS[0])
    job = bench.backend.generate(bench.tokens("Hello"), bench.endless(), broken)
    assert drain(job) == "stop"
    assert bench.ask(PROMPTS[0]) == expected


def test_a_conversation_gives_the_same_text_with_and_without_the_kept_cache(make_bench: Callable[..., Bench]) -> None:
    keeping = make_bench(slots=2)
    forgetting = make_bench(slots=2, options={"cache_prompt": "off"})
    text = PROMPTS[0]
    for _turn in range(4):
        with_cache, without = keeping.ask(text), forgetting.ask(text)
        assert with_cache == without
        text += without.data.decode("utf-8", "replace") + PROMPTS[1]


def test_closing_ends_running_jobs_with_an_error(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=1)
    running = bench.backend.generate(bench.tokens("Hello"), bench.endless(), lambda: False)
    next(running)
    bench.backend.close()
    with pytest.raises(RuntimeError, match="shutting down"):
        list(running)
    with pytest.raises(RuntimeError):
        bench.ask([1, 2, 3])
    assert not [thread for thread in threading.enumerate() if thread.name == "llama-decode" and not thread.daemon]
