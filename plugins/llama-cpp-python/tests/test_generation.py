"""One job: where it ends, how it chooses, what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from llama_bench import GREEDY, PROMPTS, Answer, Bench

from rbee.plugin import Sampling


def test_temperature_zero_is_greedy_whatever_the_seed(bench: Bench) -> None:
    first = bench.ask(PROMPTS[0], replace(GREEDY, seed=1))
    assert first.ids
    assert first == bench.ask(PROMPTS[0], replace(GREEDY, seed=2, top_k=1000, top_p=0.1))


def test_a_seed_repeats_a_text_and_another_seed_changes_it(bench: Bench) -> None:
    hot = replace(bench.endless(max_tokens=60), temperature=3.0, top_k=0, top_p=1.0, min_p=0.0)
    texts = [bench.ask("Hello", replace(hot, seed=seed)).ids for seed in (1, 1, 2, None, None, 0xFFFFFFFF, 0xFFFFFFFF)]
    assert texts[0] == texts[1]
    assert texts[5] == texts[6]
    assert len(set(texts)) == 5


def test_max_tokens_ends_a_job_by_length(bench: Bench) -> None:
    for count in (1, 5):
        answer = bench.ask("Hello", bench.endless(max_tokens=count))
        assert (len(answer.ids), answer.reason) == (count, "length")
    assert bench.ask("Hello", replace(GREEDY, max_tokens=0)) == Answer(b"", (), "length")


def test_a_full_context_ends_a_job_by_length(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(context_tokens=256, slots=2)
    prompt = bench.tokens("Hello")
    answer = bench.ask(prompt, bench.endless())
    assert bench.loaded.context_tokens == 256
    assert len(prompt) + len(answer.ids) == 256
    assert answer.reason == "length"


def test_a_prompt_larger_than_the_context_is_refused_with_both_numbers(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(context_tokens=256, slots=2)
    with pytest.raises(ValueError, match=r"256 tokens.*255 at most"):
        bench.ask([5] * 256)
    assert len(bench.ask([5] * 255, bench.endless()).ids) == 1


def test_an_empty_prompt_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="empty"):
        bench.ask([])


def test_the_end_token_ends_a_job_and_is_not_part_of_the_text(bench: Bench) -> None:
    model = bench.backend._loaded()
    end = next(token for token in range(model.vocabulary_tokens) if model.ends(token))
    assert bench.ask("Hello", replace(GREEDY, logit_bias={end: 1000.0})) == Answer(b"", (), "stop")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": float("inf")}, "top_p"),
        ({"repeat_penalty": 0.0}, "repeat_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias"),
    ],
)
def test_a_bad_setting_is_refused_by_name(bench: Bench, changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        bench.ask("Hello", replace(GREEDY, **changes))  # type: ignore[arg-type]  # wrong on purpose


def test_a_logit_bias_forces_and_forbids_tokens(bench: Bench) -> None:
    free = bench.ask("Hello", bench.endless(max_tokens=20))
    token = free.ids[0]
    assert bench.ask("Hello", replace(GREEDY, max_tokens=4, logit_bias={token: 1000.0})).ids == (token,) * 4
    endless = bench.endless(max_tokens=20)
    forbidden = bench.ask("Hello", replace(endless, logit_bias={**endless.logit_bias, token: -1000.0}))
    assert token not in forbidden.ids


def test_penalties_make_a_model_repeat_itself_less(bench: Bench) -> None:
    plain = bench.ask("a a a a a a a a", bench.endless(max_tokens=60))
    varied = bench.ask("a a a a a a a a", replace(bench.endless(max_tokens=60), frequency_penalty=5.0))
    assert max(Counter(varied.ids).values()) < max(Counter(plain.ids).values())


def test_tokens_carry_whole_bytes_of_any_script(bench: Bench) -> None:
    for text in ("日本語 e\u0301 🙂 \x00 fin", "\ufffd\u200d", "plain"):
        model = bench.backend._loaded()
        ids = bench.backend.tokenize(text, special=False)
        assert b"".join(model.piece(token) for token in ids) == text.encode()


def test_control_tokens_are_read_only_where_asked(bench: Bench) -> None:
    text = bench.backend.special_tokens()["eos_token"]
    as_control = bench.backend.tokenize(f"x{text}", special=True)
    as_text = bench.backend.tokenize(f"x{text}", special=False)
    assert len(as_control) < len(as_text)


def test_a_rendered_template_gets_no_second_beginning_token(bench: Bench) -> None:
    bos = bench.backend.special_tokens()["bos_token"]
    plain = bench.backend.tokenize("x", special=True)
    assert bench.backend.tokenize(f"{bos}x", special=True)[:1] == bench.backend.tokenize(bos, special=True)[:1]
    assert len(bench.backend.tokenize(f"{bos}x", special=True)) <= len(plain) + 1


def test_the_chat_template_is_the_text_in_the_file(bench: Bench) -> None:
    template = bench.backend.chat_template()
    assert template is not None
    assert "messages" in template


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ['say "hi" \\o/', "日本 🙂\n"]},
        "ünï": {"type": "integer"},
    },
    "required": ["name", "kind", "ünï"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_json_schema_holds_at_any_temperature(bench: Bench, temperature: float) -> None:
    settings = [
        Sampling(temperature=temperature, max_tokens=300, seed=seed, json_schema=PERSON, min_p=0.0) for seed in range(4)
    ]
    schemas = [partial(bench.ask, PROMPTS[seed], one) for seed, one in enumerate(settings)]
    free = [partial(bench.ask, prompt) for prompt in PROMPTS[4:]]
    alone = [job() for job in free]
    results = bench.ask_together([*schemas, *free])
    assert results[4:] == alone
    for answer in results[:4]:
        assert isinstance(answer, Answer)
        value = json.loads(answer.data.decode("utf-8", "replace"))
        assert list(value) == ["name", "kind", "ünï"]
        assert value["kind"] in ('say "hi" \\o/', "日本 🙂\n")
        assert isinstance(value["ünï"], int)
        assert answer.reason == "stop"


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "https://localhost/schema.json"}, "not allowed"),
        ({"$ref": "#/missing"}, "missing"),
        ({"type": "string", "maxLength": 10**9}, "maxLength"),
        ({"type": "array", "items": {"type": "null"}, "minItems": 10**9}, "minItems"),
        ({"type": "array", "items": {"type": "null"}, "minItems": "7"}, "minItems"),
        ({"type": "string", "pattern": "^a{999999999}$"}, "pattern"),
        ({"type": "string", "pattern": "^(?=a)b$"}, "pattern"),
        ({"type": "string", "pattern": "^\\q$"}, "refuses its grammar"),
        ({"type": "wish"}, "wish"),
        ({"properties": {"a": True}}, "bool"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(bench: Bench, schema: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)cannot be enforced.*{reason}"):
        bench.ask("Hello", replace(GREEDY, json_schema=schema))


def test_a_schema_nested_without_end_is_refused(bench: Bench) -> None:
    schema: dict[str, object] = {"type": "null"}
    for _level in range(20_000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="nested too deeply"):
        bench.ask("Hello", replace(GREEDY, json_schema=schema))
