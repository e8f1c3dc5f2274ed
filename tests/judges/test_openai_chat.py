"""The real `openai` package chats with the built-in model: whole answers, streams, sampling, tools, JSON."""

from __future__ import annotations

import json

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from openai.types.chat.completion_create_params import ResponseFormat

MODEL = "rbee-demo"
ADD: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How do I add a machine?"}]
WEATHER: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOLS: list[ChatCompletionToolParam] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def test_a_whole_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ADD)
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.completion_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_job_and_its_worker_are_in_the_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=ADD, max_tokens=1)
    assert raw.headers["x-rbee-job"].startswith("job_")
    assert raw.headers["x-rbee-worker"].endswith("/rbee-demo")
    assert raw.parse().choices


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=ADD, temperature=0, seed=1)
    chunks = list(client.chat.completions.create(model=MODEL, messages=ADD, temperature=0, seed=1, stream=True))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks), "nobody asked for the usage"


def test_include_usage_comes_last_and_without_choices(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=ADD, max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
    )
    *before, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in before)


@pytest.mark.parametrize("model", [MODEL, "echo"])
def test_n_gives_as_many_choices(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=ADD, n=2, max_tokens=3)
    assert sorted(choice.index for choice in answer.choices) == [0, 1]
    assert all(choice.message.content and choice.finish_reason == "length" for choice in answer.choices)


def test_n_choices_stream_side_by_side(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(model=MODEL, messages=ADD, n=2, max_tokens=3, stream=True)
    ends = [c.choices[0].index for c in chunks if c.choices and c.choices[0].finish_reason == "length"]
    assert sorted(ends) == [0, 1]


@pytest.mark.parametrize("model", [MODEL, "echo"])
def test_an_answer_ends_before_a_stop_text(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=ADD, temperature=0).choices[0].message.content or ""
    stop = whole.split()[2]
    answer = client.chat.completions.create(model=model, messages=ADD, temperature=0, stop=[stop]).choices[0]
    assert answer.message.content == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_temperature_0_and_a_seed_give_the_same_answer_again(client: openai.OpenAI) -> None:
    answers = {
        client.chat.completions.create(model=MODEL, messages=ADD, temperature=0, seed=7).choices[0].message.content
        for _ in range(4)
    }
    assert len(answers) == 1


def test_a_seed_repeats_a_warm_answer(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str | None:
        # Without the engine's own cuts of unlikely tokens, a model that is sure of its answer varies, too.
        answer = client.chat.completions.create(
            model=MODEL, messages=ADD, temperature=2, top_p=1, seed=seed, max_tokens=40, extra_body={"min_p": 0}
        )
        return answer.choices[0].message.content

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("model", [MODEL, "echo"])
def test_the_limit_of_tokens_ends_an_answer(client: openai.OpenAI, model: str) -> None:
    by_old_name = client.chat.completions.create(model=model, messages=ADD, max_tokens=3)
    by_new_name = client.chat.completions.create(model=model, messages=ADD, max_completion_tokens=3)
    for answer in (by_old_name, by_new_name):
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3


def test_logprobs_come_with_their_rivals(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(
        model=MODEL, messages=ADD, logprobs=True, top_logprobs=2, max_tokens=3, temperature=0
    ).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    for token in choice.logprobs.content:
        assert token.logprob <= 0
        assert [rival.logprob for rival in token.top_logprobs] == sorted(
            (rival.logprob for rival in token.top_logprobs), reverse=True
        )
        assert len(token.top_logprobs) == 2


def test_a_required_tool_is_called(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(
        model=MODEL, messages=WEATHER, tools=TOOLS, tool_choice="required", temperature=0
    ).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert call.id
    assert call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments)["city"], str)


def test_a_tool_may_be_called_or_not(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(model=MODEL, messages=WEATHER, tools=TOOLS, temperature=0).choices[0]
    assert choice.finish_reason == ("tool_calls" if choice.message.tool_calls else "stop")
    assert choice.message.tool_calls or choice.message.content


def test_a_tool_call_streams_in_pieces(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=WEATHER, tools=TOOLS, tool_choice="required", temperature=0, stream=True
    )
    choices = [chunk.choices[0] for chunk in stream if chunk.choices]
    pieces = [piece for choice in choices for piece in choice.delta.tool_calls or []]
    assert {piece.index for piece in pieces} == {0}
    assert pieces[0].id
    assert pieces[0].function is not None
    assert pieces[0].function.name == "get_weather"
    arguments = "".join(piece.function.arguments or "" for piece in pieces if piece.function)
    assert isinstance(json.loads(arguments)["city"], str)
    assert choices[-1].finish_reason == "tool_calls"


def test_what_a_tool_said_is_taken(client: openai.OpenAI) -> None:
    call = client.chat.completions.create(
        model=MODEL, messages=WEATHER, tools=TOOLS, tool_choice="required", temperature=0
    ).choices[0]
    assert call.message.tool_calls
    said: ChatCompletionMessageParam = {
        "role": "tool",
        "tool_call_id": call.message.tool_calls[0].id,
        "content": '{"degrees": 18}',
    }
    turns: list[ChatCompletionMessageParam] = [*WEATHER, call.message.to_dict(), said]  # type: ignore[list-item]
    answer = client.chat.completions.create(model=MODEL, messages=turns, tools=TOOLS, max_tokens=60)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


class Machine(pydantic.BaseModel):
    name: str
    gpus: int


def test_an_answer_keeps_to_a_json_schema(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=ADD, response_format=Machine, temperature=0, max_tokens=500
    )
    assert isinstance(parsed.choices[0].message.parsed, Machine)


def test_a_json_object_is_one(client: openai.OpenAI) -> None:
    wanted: ResponseFormat = {"type": "json_object"}
    choice = client.chat.completions.create(
        model=MODEL, messages=ADD, response_format=wanted, temperature=0, max_tokens=1000
    ).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)
    else:
        assert (choice.message.content or "").lstrip().startswith("{")


def test_a_schema_that_is_none_is_refused(client: openai.OpenAI) -> None:
    wanted: ResponseFormat = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        client.chat.completions.create(model=MODEL, messages=ADD, response_format=wanted)


def test_an_engine_without_tools_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="echo", messages=WEATHER, tools=TOOLS)
