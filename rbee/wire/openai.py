"""The requests that the OpenAI and Anthropic endpoints take, decoded and checked in one step.

A request is decoded to admit and route it; its body travels on as it came, so fields that are not named here
reach the engine unharmed. Sources: OpenAI API reference (2026-10), Anthropic Messages API, Open Responses.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from rbee.errors import InvalidRequest, NotSupported
from rbee.wire.patterns import check_grammar, check_schema

T = TypeVar("T")

MAX_BODY_BYTES = 4 * 1024 * 1024
LARGE_BYTES = 131_072
MAX_VALUES = 250_000
"""Objects, lists, fields and texts of a large request, counted by their marks, wherever these stand."""

ModelName = Annotated[str, Meta(min_length=1, max_length=256)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
PriorityWord = Literal["interactive", "normal", "batch", "high", "low"]
"""`high` is served as interactive and `low` as batch; routing scripts see the word itself."""
Fraction = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
StopText = Annotated[str, Meta(max_length=4096)]
Stop = StopText | Annotated[list[StopText], Meta(max_length=16)]
LogitBias = Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
MAX_INPUTS = 2048


def _one_kind(text: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of what `_check_input` lets through."""
    several = {"type": "array", "maxItems": MAX_INPUTS}
    token_ids = {"type": "array", "items": {"type": "integer"}}
    return {"oneOf": [text, {**several, "items": text}, token_ids, {**several, "items": token_ids}]}


_Input = str | Annotated[list[str | TokenId | TokenIds], Meta(min_length=1, max_length=1_048_576)]
Input = Annotated[_Input, Meta(extra_json_schema=_one_kind({"type": "string"}))]
"""A text, several texts, one list of token ids, or several; `_check_input` refuses a mixture."""
FilledInput = Annotated[_Input, Meta(extra_json_schema=_one_kind({"type": "string", "minLength": 1}))]
Part = Annotated[
    dict[str, Any], Meta(extra_json_schema={"required": ["type"], "properties": {"type": {"type": "string"}}})
]
Parts = list[Part]


class StreamOptions(Struct, frozen=True):
    """What a stream carries besides the answer."""

    include_usage: bool | None = None


class InferenceRequest(Struct, kw_only=True):
    """What every inference request has: the model's name, and whether the answer streams."""

    dialect: ClassVar[Literal["openai", "anthropic"]] = "openai"
    capability: ClassVar[str]
    feature: ClassVar[str | None] = None

    model: ModelName
    stream: bool | None = None
    # vLLM has a number of this name, which is between the client and the engine.
    priority: PriorityWord | int | None = None
    # Never taken from a client: they reach into the engine's memory or its other jobs …
    n_discard: None = None
    id_slot: None = None
    prompt_embeds: None = None
    # … or have a gateway that serves as a worker call elsewhere, with its own key.
    api_base: None = None
    base_url: None = None

    def check(self) -> None:
        """Check what a type cannot say. Raises: InvalidRequest."""

    def prompt_bytes(self) -> int:
        """Return the size of the prompt in bytes of UTF-8, near enough to route by."""
        return 0

    def output_limit(self) -> int | None:
        """Return the most tokens that the client wants, or None."""
        return None

    def needs(self) -> set[str]:
        """Return the engine features without which this request cannot be answered."""
        return {self.feature} if self.feature else set()


class Generation(InferenceRequest, kw_only=True):
    """The sampling fields that chat and text completions share."""

    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Fraction | None = None
    repeat_penalty: Annotated[float, Meta(ge=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    max_tokens: TokenCount | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    logit_bias: LogitBias | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    metadata: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    grammar: Any = None
    json_schema: Any = None

    def check(self) -> None:
        if isinstance(self.grammar, str):
            check_grammar(self.grammar, "grammar")
        if self.json_schema:
            check_schema(self.json_schema, "json_schema")
        if self.response_format:
            check_schema(self.response_format, "response_format")

    def output_limit(self) -> int | None:
        return self.max_tokens


class Message(Struct, kw_only=True):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Parts | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


SPEAKS = {
    "if": {"properties": {"role": {"enum": ["system", "developer", "user"]}}},
    "then": {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
}
"""Only an assistant's turn and a tool's may be without content."""


class ChatRequest(Generation, kw_only=True):
    """`POST /v1/chat/completions`."""

    capability: ClassVar[str] = "chat"

    messages: Annotated[list[Annotated[Message, Meta(extra_json_schema=SPEAKS)]], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: TokenCount | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

    def check(self) -> None:
        super().check()
        _check_tools(self.tools)
        for index, message in enumerate(self.messages):
            if message.content is None and message.role in ("system", "developer", "user"):
                raise InvalidRequest(
                    f"messages[{index}] has the role {message.role!r} but no content",
                    param=f"messages[{index}].content",
                )
            _check_parts(message.content, f"messages[{index}].content")

    def output_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def prompt_bytes(self) -> int:
        return sum(_content_bytes(message.content) for message in self.messages)

    def needs(self) -> set[str]:
        wanted = set()
        if self.tools:
            wanted.add("tools")
        if any(part.get("type") == "image_url" for message in self.messages for part in _parts(message.content)):
            wanted.add("vision")
        if self.response_format and self.response_format.get("type") in ("json_schema", "json_object"):
            wanted.add("json_schema")
        if self.logprobs:
            wanted.add("logprobs")
        return wanted


class CompletionRequest(Generation, kw_only=True):
    """`POST /v1/completions`."""

    capability: ClassVar[str] = "completion"

    prompt: Input
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | bool | None = None
    suffix: str | None = None

    def check(self) -> None:
        super().check()
        _check_input(self.prompt, "prompt")

    def prompt_bytes(self) -> int:
        return _input_bytes(self.prompt)

    def needs(self) -> set[str]:
        return {"logprobs"} if self.logprobs else set()


class EmbeddingRequest(InferenceRequest, kw_only=True):
    """`POST /v1/embeddings`."""

    capability: ClassVar[str] = "embedding"

    input: FilledInput
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=65536)] | None = None
    user: str | None = None

    def check(self) -> None:
        _check_input(self.input, "input")
        if self.input == "" or (isinstance(self.input, list) and "" in self.input):
            raise InvalidRequest("input must not be an empty string", param="input")

    def prompt_bytes(self) -> int:
        return _input_bytes(self.input)


class RerankRequest(InferenceRequest, kw_only=True):
    """`POST /v1/rerank`, as Jina, Cohere and llama.cpp have it."""

    capability: ClassVar[str] = "rerank"

    query: Annotated[str, Meta(min_length=1)]
    documents: Annotated[list[str | dict[str, Any]], Meta(min_length=1, max_length=2048)]
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool | None = None

    def prompt_bytes(self) -> int:
        return len(self.query) + sum(len(d) if isinstance(d, str) else 256 for d in self.documents)


class ResponsesRequest(InferenceRequest, kw_only=True):
    """`POST /v1/responses`."""

    capability: ClassVar[str] = "chat"
    feature: ClassVar[str | None] = "responses"

    input: Annotated[str, Meta(min_length=1)] | Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=4096)]
    instructions: str | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    max_output_tokens: TokenCount | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    previous_response_id: Annotated[str | None, Meta(extra_json_schema={"type": "null"})] = None
    metadata: dict[str, Any] | None = None

    def check(self) -> None:
        if self.previous_response_id is not None:
            raise NotSupported(
                "previous_response_id is not supported: no answers are stored here",
                hint="the whole conversation in `input`",
                param="previous_response_id",
            )
        _check_tools(self.tools)
        if self.text:
            check_schema(self.text, "text")

    def output_limit(self) -> int | None:
        return self.max_output_tokens

    def prompt_bytes(self) -> int:
        items = [] if isinstance(self.input, str) else self.input
        whole = len(self.input) if isinstance(self.input, str) else 0
        return whole + sum(_content_bytes(item.get("content")) for item in items)

    def needs(self) -> set[str]:
        items = [] if isinstance(self.input, str) else self.input
        contents = [content for item in items if isinstance(content := item.get("content"), list)]
        seen = any(isinstance(part, dict) and part.get("type") == "input_image" for c in contents for part in c)
        return super().needs() | ({"vision"} if seen else set())


class AnthropicMessage(Struct, kw_only=True):
    """One turn of an Anthropic conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Parts


class CountTokensRequest(InferenceRequest, kw_only=True):
    """`POST /v1/messages/count_tokens`."""

    dialect: ClassVar[Literal["openai", "anthropic"]] = "anthropic"
    capability: ClassVar[str] = "chat"
    feature: ClassVar[str | None] = "messages"

    messages: Annotated[list[AnthropicMessage], Meta(min_length=1, max_length=4096)]
    system: str | Parts | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None

    def check(self) -> None:
        _check_tools(self.tools)
        _check_parts(self.system, "system")
        for index, message in enumerate(self.messages):
            _check_parts(message.content, f"messages[{index}].content")

    def prompt_bytes(self) -> int:
        return sum(_content_bytes(message.content) for message in self.messages)

    def needs(self) -> set[str]:
        seen = any(part["type"] == "image" for message in self.messages for part in _parts(message.content))
        return super().needs() | ({"vision"} if seen else set())


class MessagesRequest(CountTokensRequest, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: TokenCount
    temperature: Fraction | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop_sequences: Annotated[list[StopText], Meta(max_length=16)] | None = None
    tool_choice: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None

    def output_limit(self) -> int | None:
        return self.max_tokens


REQUESTS: dict[str, type[InferenceRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/rerank": RerankRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
}
"""Every inference endpoint, with the request that it takes."""

_DECODERS = {path: msgspec.json.Decoder(request) for path, request in REQUESTS.items()}


def decode(path: str, body: bytes) -> InferenceRequest:
    """Decode and check the body of a request to one of `REQUESTS`. Raises: InvalidRequest, NotSupported."""
    request = parse(body, _DECODERS[path])
    request.check()
    return request


def parse(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode a request's body and check its types. Raises: InvalidRequest that names the field."""
    if len(body) > LARGE_BYTES:
        _check_density(body)
    try:
        try:
            return decoder.decode(body)
        except msgspec.ValidationError:
            # The second look makes an object of every value; in the queen nothing else runs meanwhile.
            if len(body) > LARGE_BYTES:
                raise
            return msgspec.convert(_whole_numbers(msgspec.json.decode(body)), decoder.type)
    except msgspec.ValidationError as problem:
        raise invalid(problem) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise InvalidRequest(f"The request body is not valid JSON: {problem}", hint="a JSON object") from None
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply") from None


def _check_density(body: bytes) -> None:
    """Refuse a body that takes many times its size in memory, as `[{},{},…` does. Raises: InvalidRequest."""
    if sum(map(body.count, (b"{", b"[", b'":', b'",'))) > MAX_VALUES:
        raise InvalidRequest(f"The request body has more than {MAX_VALUES} objects, lists, fields and texts")


def _whole_numbers(value: Any) -> Any:
    """Return JSON values with 5.0 as 5: JSON does not tell them apart (RFC 8259, 6), and some clients write it so."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    if isinstance(value, dict):
        return {name: _whole_numbers(item) for name, item in value.items()}
    return value


def invalid(problem: msgspec.ValidationError) -> InvalidRequest:
    """Turn msgspec's `… - at `$.field`` into an error that names the field as OpenAI does."""
    text, _, where = str(problem).partition(" - at `$")
    param = where.rstrip("`").lstrip(".").replace("[...]", "[]") or None
    missing = text.startswith("Object missing required field `")
    if missing:
        name = text.split("`")[1]
        param = f"{param}.{name}" if param else name
        return InvalidRequest(f"you must provide a {param!r} parameter", param=param)
    return InvalidRequest(f"Invalid value for {param!r}: {text}" if param else text, param=param)


class ModelCard(Struct, frozen=True, kw_only=True):
    """One entry of `GET /v1/models`. What OpenAI does not have stands under `rbee`."""

    id: str
    created: int
    owned_by: str = "rbee"
    object: Literal["model"] = "model"
    rbee: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class ModelList(Struct, frozen=True, kw_only=True):
    """The body of `GET /v1/models`."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class ExecuteRequest(Struct, kw_only=True):
    """`POST /execute`: the plain form, one prompt in, an event stream or one JSON object out."""

    prompt: Annotated[str, Meta(min_length=1)]
    system: str | None = None
    max_tokens: TokenCount | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stream: bool = True
    model: str | None = None


def _parts(content: str | Parts | None) -> Parts:
    return content if isinstance(content, list) else []


def _check_input(value: Input, param: str) -> None:
    if isinstance(value, list) and len({type(item) for item in value}) > 1:
        raise InvalidRequest(f"{param} must be texts, or token ids, but not both", param=param)
    if isinstance(value, list) and isinstance(value[0], (str, list)) and len(value) > MAX_INPUTS:
        raise InvalidRequest(f"{param} has {len(value)} entries; at most {MAX_INPUTS} are taken at once", param=param)


def _check_tools(tools: list[dict[str, Any]] | None) -> None:
    for index, tool in enumerate(tools or ()):
        check_schema(tool, f"tools[{index}]")


def _check_parts(content: str | Parts | None, where: str) -> None:
    for index, part in enumerate(_parts(content)):
        if not isinstance(part.get("type"), str):
            raise InvalidRequest(f"{where}[{index}] has no type", param=f"{where}[{index}].type")


def _content_bytes(content: object) -> int:
    if isinstance(content, str):
        return len(content)
    if not isinstance(content, list):
        return 0
    return sum(len(part["text"]) for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))


def _input_bytes(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    return sum(_input_bytes(item) for item in value) if isinstance(value, list) else 4
