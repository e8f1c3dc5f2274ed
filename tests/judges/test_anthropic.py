"""The real `anthropic` package talks to the built-in model: messages, streams, tools, counting, refusals."""

from __future__ import annotations

import anthropic
import pytest
from anthropic.types import MessageParam, ToolParam

MODEL = "rbee-demo"
ADD: list[MessageParam] = [{"role": "user", "content": "How do I add a machine?"}]
WEATHER: list[MessageParam] = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL: ToolParam = {
    "name": "get_weather",
    "description": "Get the weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
# The package has no such argument; the API has.
COLD = {"temperature": 0}


def test_a_whole_message(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(model=MODEL, max_tokens=300, messages=ADD)
    assert message.type == "message"
    assert message.role == "assistant"
    assert message.model == MODEL
    assert text_of(message)
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 0
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) > 0


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_system_text_is_read(claude: anthropic.Anthropic) -> None:
    plain = claude.messages.count_tokens(model=MODEL, messages=ADD)
    guided = claude.messages.count_tokens(model=MODEL, messages=ADD, system="Answer in one sentence.")
    assert guided.input_tokens > plain.input_tokens
    blocks = claude.messages.create(
        model=MODEL, max_tokens=50, messages=ADD, system=[{"type": "text", "text": "Answer in one sentence."}]
    )
    assert text_of(blocks)


def test_counted_tokens_are_the_tokens_used(claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(model=MODEL, messages=ADD).input_tokens
    usage = claude.messages.create(model=MODEL, max_tokens=1, messages=ADD).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_the_events_of_a_stream_come_in_order(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(model=MODEL, max_tokens=300, messages=ADD, extra_body=COLD)
    events = list(claude.messages.create(model=MODEL, max_tokens=300, messages=ADD, extra_body=COLD, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert "".join(delta.text for delta in deltas if delta.type == "text_delta") == text_of(whole)


def test_the_package_puts_a_stream_together(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model=MODEL, max_tokens=300, messages=ADD) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == "".join(block.text for block in message.content if block.type == "text") != ""
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 0


def test_the_limit_of_tokens_ends_a_message(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(model=MODEL, max_tokens=3, messages=ADD)
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 3


def test_a_message_ends_before_a_stop_sequence(claude: anthropic.Anthropic) -> None:
    whole = text_of(claude.messages.create(model=MODEL, max_tokens=300, messages=ADD, extra_body=COLD))
    stop = whole.split()[2]
    message = claude.messages.create(model=MODEL, max_tokens=300, messages=ADD, stop_sequences=[stop], extra_body=COLD)
    assert text_of(message) == whole[: whole.index(stop)]
    assert message.stop_sequence == stop


def test_any_tool_is_called(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(
        model=MODEL, max_tokens=200, messages=WEATHER, tools=[TOOL], tool_choice={"type": "any"}, extra_body=COLD
    )
    assert message.stop_reason == "tool_use"
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert call.name == "get_weather"
    assert call.id
    assert isinstance(call.input["city"], str)


def test_a_tool_call_streams(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(
        model=MODEL, max_tokens=200, messages=WEATHER, tools=[TOOL], tool_choice={"type": "any"}, extra_body=COLD
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert len(pieces) > 1
    assert isinstance(call.input, dict)
    assert isinstance(call.input["city"], str)
    assert message.stop_reason == "tool_use"


def test_what_a_tool_said_is_taken(claude: anthropic.Anthropic) -> None:
    turns: list[MessageParam] = [
        *WEATHER,
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "18 degrees"}]},
    ]
    message = claude.messages.create(model=MODEL, max_tokens=60, messages=turns, tools=[TOOL])
    assert message.stop_reason in ("end_turn", "max_tokens", "tool_use")
    assert message.content


def test_an_unknown_model_is_not_found(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="Did you mean 'rbee-demo'") as refused:
        claude.messages.create(model="rbee-dmeo", max_tokens=3, messages=ADD)
    assert isinstance(refused.value.body, dict)
    assert refused.value.body["error"]["type"] == "not_found_error"


def test_a_wrong_field_is_a_bad_request(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        claude.messages.create(model=MODEL, max_tokens=3, messages=[])
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(model=MODEL, max_tokens=0, messages=ADD)
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        claude.messages.count_tokens(model=MODEL, messages=[])


def test_an_image_is_refused_by_a_model_without_vision(claude: anthropic.Anthropic) -> None:
    picture: MessageParam = {
        "role": "user",
        "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}],
    }
    with pytest.raises(anthropic.BadRequestError, match="vision"):
        claude.messages.create(model=MODEL, max_tokens=3, messages=[picture])


def test_a_wrong_key_of_ours_is_refused(claude: anthropic.Anthropic) -> None:
    with (
        claude.with_options(api_key="rbee_sk_wrong") as stranger,
        pytest.raises(anthropic.AuthenticationError, match="rbee key"),
    ):
        stranger.messages.create(model=MODEL, max_tokens=3, messages=ADD)
