"""The real `openai` package at the other endpoints: completions, embeddings, models, responses."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import openai
import pytest
from openai.types.responses import FunctionToolParam, Response, ResponseStreamEvent

MODEL = "rbee-demo"
TOOL: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}


@pytest.mark.parametrize("model", [MODEL, "echo"])
def test_a_text_is_continued(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt="rbee is a keeper of machines", max_tokens=3)
    assert answer.object == "text_completion"
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize("model", [MODEL, "echo"])
def test_several_texts_are_continued_in_their_order(client: openai.OpenAI, model: str) -> None:
    prompts = ["rbee is a keeper", "a hive is a machine", "the queen routes jobs"]
    answer = client.completions.create(model=model, prompt=prompts, max_tokens=2, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    alone = [client.completions.create(model=model, prompt=p, max_tokens=2, temperature=0) for p in prompts]
    assert [choice.text for choice in answer.choices] == [one.choices[0].text for one in alone]


@pytest.mark.parametrize("model", [MODEL, "echo"])
def test_a_continuation_streams(client: openai.OpenAI, model: str) -> None:
    prompt = "rbee is a keeper of machines"
    whole = client.completions.create(model=model, prompt=prompt, max_tokens=5, temperature=0)
    chunks = list(client.completions.create(model=model, prompt=prompt, max_tokens=5, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]


def test_embeddings_are_one_vector_a_text(client: openai.OpenAI) -> None:
    # The package asks for base64 by itself and decodes it.
    answer = client.embeddings.create(model="echo", input=["a machine", "a hive", "a machine"])
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert answer.data[0].embedding == answer.data[2].embedding != answer.data[1].embedding
    assert {len(entry.embedding) for entry in answer.data} == {64}
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0


def test_floats_and_base64_are_the_same_vector(client: openai.OpenAI) -> None:
    floats = client.embeddings.create(model="echo", input="a machine", encoding_format="float").data[0].embedding
    packed: Any = client.embeddings.create(model="echo", input="a machine", encoding_format="base64").data[0].embedding
    numbers = struct.unpack(f"<{len(floats)}f", base64.b64decode(packed))
    assert numbers == pytest.approx(floats, abs=1e-6)


def test_token_ids_can_be_embedded(client: openai.OpenAI) -> None:
    text = client.embeddings.create(model="echo", input="hi").data[0].embedding
    assert client.embeddings.create(model="echo", input=list(b"hi")).data[0].embedding == text
    assert client.embeddings.create(model="echo", input=[list(b"hi")]).data[0].embedding == text


def test_a_length_that_the_model_does_not_have_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="one vector length") as refused:
        client.embeddings.create(model="echo", input="a machine", dimensions=8)
    assert refused.value.param == "dimensions"


def test_a_model_that_does_not_embed_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="embedding"):
        client.embeddings.create(model=MODEL, input="a machine")


def test_models_are_listed_and_described(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert {MODEL, "echo"} <= set(listed)
    one = client.models.retrieve(MODEL)
    assert one.object == "model"
    assert one.owned_by == "rbee"
    assert one.created == listed[MODEL].created > 0
    with pytest.raises(openai.NotFoundError, match="rbee-demo"):
        client.models.retrieve("rbee-dmeo")


def test_a_response_is_whole(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="How do I add a machine?", temperature=0)
    assert response.object == "response"
    assert response.status == "completed"
    assert response.output_text
    assert response.error is None
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_a_response_takes_turns_and_instructions(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL,
        instructions="Answer in one sentence.",
        input=[
            {"role": "user", "content": "Hello"},
            {"type": "message", "role": "assistant", "content": "Hello!"},
            {"role": "user", "content": [{"type": "input_text", "text": "What is a hive?"}]},
        ],
    )
    assert response.output_text
    assert response.instructions == "Answer in one sentence."


def test_a_response_cut_at_its_limit_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="How do I add a machine?", max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def test_a_response_streams_typed_events(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input="How do I add a machine?", temperature=0)
    events = list(client.responses.create(model=MODEL, input="How do I add a machine?", temperature=0, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert _last(events).output_text == whole.output_text
    assert kinds.index("response.output_item.added") < kinds.index("response.content_part.added")
    assert kinds.index("response.output_text.done") < kinds.index("response.output_item.done")


def _last(events: list[ResponseStreamEvent]) -> Response:
    last = events[-1]
    assert last.type == "response.completed"
    return last.response


def test_a_response_calls_a_tool(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, input="What is the weather in Paris?", tools=[TOOL], tool_choice="required", temperature=0
    )
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert call.name == "get_weather"
    assert call.call_id
    assert isinstance(json.loads(call.arguments)["city"], str)


def test_a_response_to_a_stored_one_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no answers are stored here"):
        client.responses.create(model=MODEL, input="And then?", previous_response_id="resp_1")
