"""OpenAI's HTTP for an engine that is a library: chat and text completions, embeddings, rerank."""

from __future__ import annotations

import base64
import contextlib
import itertools
import logging
import struct
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from typing import Any

from rbee.errors import ContextExceeded, InvalidRequest, NotSupported, RbeeError, WorkerLost
from rbee.http.server import Request, Response, reply
from rbee.plugin import AnsweringBackend, Capability, Sampling
from rbee.wire.openai import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Generation,
    InferenceRequest,
    RerankRequest,
)
from rbee.worker.bodies import Body, ChatBody, Choice, CompletionBody, Step
from rbee.worker.generation import Limits, pieces
from rbee.worker.queueing import Slots
from rbee.worker.relay import ClientLeft, error_event
from rbee.worker.render import Renderer
from rbee.worker.runner import Runner

log = logging.getLogger("rbee.worker")

LOOK_S = 0.05
DONE = b"data: [DONE]\n\n"
NO_LIMIT = 1 << 31


class Answers:
    """The endpoints of one loaded answering backend."""

    def __init__(self, runner: Runner, backend: AnsweringBackend) -> None:
        self._runner = runner
        self._backend = backend
        self._lock = threading.Lock()
        self._slots: Slots | None = None
        self._renderer: Renderer | None = None
        self._closed = False

    def prepare(self) -> None:
        """Start what the first job would wait for. The model is loaded."""
        if Capability.CHAT in self._runner.capabilities:
            with contextlib.suppress(RbeeError):  # it was told to end meanwhile
                self._template().start()

    def close(self) -> None:
        """End the renderer's process."""
        with self._lock:
            self._closed = True
            renderer = self._renderer
        if renderer is not None:
            renderer.close()

    def waiting(self) -> int:
        """Return how many jobs wait for a slot."""
        return self._slots.waiting if self._slots else 0

    def answer(self, request: Request, wanted: InferenceRequest) -> Response:
        """Answer one inference request. Raises: RbeeError, ClientLeft."""
        with contextlib.ExitStack() as held:
            presence = Presence(request, self._runner)
            try:
                held.enter_context(self._ready_slots().one(presence.gone))
                response = self._answer(wanted, presence, held)
            except ClientLeft:
                raise
            except Exception as problem:  # noqa: BLE001  a backend may raise anything
                if presence.gone():
                    presence.refuse()
                raise as_error(problem) from None
            if not isinstance(response.body, bytes):
                response.body = _Held(response.body, held.pop_all())
            return response

    def _answer(self, wanted: InferenceRequest, presence: Presence, held: contextlib.ExitStack) -> Response:
        match wanted:
            case ChatRequest():
                steps = self._steps(self._chat_choices(wanted), presence)
                return _present(wanted, held.enter_context(contextlib.closing(steps)), ChatBody(wanted))
            case CompletionRequest():
                steps = self._steps(self._completion_choices(wanted), presence)
                return _present(wanted, held.enter_context(contextlib.closing(steps)), CompletionBody(wanted))
            case EmbeddingRequest():
                return self._embed(wanted)
            case RerankRequest():
                return self._rerank(wanted)
        raise NotSupported(f"The engine {self._backend.name} does not take this endpoint")

    def _steps(self, choices: list[Choice], presence: Presence) -> Generator[Step, None, None]:
        """Generate the choices one after the other, in one slot. Raises: ClientLeft, WorkerLost."""
        for choice in choices:
            tokens = self._backend.generate(choice.prompt, choice.sampling, presence.gone)
            source = pieces(tokens, choice.limits)
            with contextlib.closing(source):
                while True:
                    try:
                        piece = next(source)
                    except StopIteration as end:
                        presence.refuse()
                        yield choice, end.value
                        break
                    yield choice, piece

    def _chat_choices(self, wanted: ChatRequest) -> list[Choice]:
        text = self._template().chat(wanted.messages)
        prompt = self._backend.tokenize(text, special=True)
        prompt = without_second_start(prompt, text, self._backend.special_tokens().get("bos_token", ""))
        return self._choices([prompt], wanted, _schema(wanted))

    def _completion_choices(self, wanted: CompletionRequest) -> list[Choice]:
        if wanted.echo or wanted.suffix:
            field = "echo" if wanted.echo else "suffix"
            raise NotSupported(f"The engine {self._backend.name} cannot do {field}", param=field)
        return self._choices(self._token_lists(wanted.prompt, special=True), wanted, None)

    def _choices(self, prompts: list[list[int]], wanted: Generation, schema: dict[str, object] | None) -> list[Choice]:
        found: list[Choice] = []
        for prompt in prompts:
            limit = self._limit(len(prompt), wanted.output_limit())
            stop = (wanted.stop,) if isinstance(wanted.stop, str) else tuple(wanted.stop or ())
            for copy in range(wanted.n or 1):
                sampling = _sampling(wanted, limit, stop, schema, copy)
                found.append(Choice(len(found), copy, prompt, sampling, Limits(limit, stop)))
        return found

    def _limit(self, prompt_tokens: int, wanted: int | None) -> int:
        """Return how many tokens may be generated: what was asked for, and what fits. Raises: ContextExceeded."""
        context = self._runner.loaded.context_tokens
        if context is None:
            return wanted or NO_LIMIT
        if prompt_tokens >= context:
            raise ContextExceeded(prompt_tokens, context)
        return min(wanted or NO_LIMIT, context - prompt_tokens)

    def _token_lists(self, value: Any, *, special: bool) -> list[list[int]]:
        """Return one token list an input: a text, texts, token ids or lists of them."""
        if isinstance(value, str):
            return [self._backend.tokenize(value, special=special)]
        if isinstance(value[0], int):
            return [value]
        return [self._backend.tokenize(one, special=special) if isinstance(one, str) else one for one in value]

    def _embed(self, wanted: EmbeddingRequest) -> Response:
        inputs = self._token_lists(wanted.input, special=False)
        context = self._runner.loaded.context_tokens
        for tokens in inputs:
            if context is not None and len(tokens) > context:
                raise ContextExceeded(len(tokens), context)
        if wanted.dimensions:
            raise NotSupported(f"The model {self._runner.spec.model} has one vector length only", param="dimensions")
        vectors = self._backend.embed(inputs)
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, wanted.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        count = sum(map(len, inputs))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return reply({"object": "list", "data": data, "model": wanted.model, "usage": usage})

    def _rerank(self, wanted: RerankRequest) -> Response:
        texts = [_document(one, f"documents[{index}]") for index, one in enumerate(wanted.documents)]
        scores, count = self._backend.rerank(wanted.query, texts)
        order = sorted(range(len(texts)), key=lambda index: -scores[index])[: wanted.top_n]
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
        if wanted.return_documents:
            results = [one | {"document": {"text": texts[one["index"]]}} for one in results]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return reply({"object": "list", "model": wanted.model, "results": results, "usage": usage})

    def _ready_slots(self) -> Slots:
        with self._lock:
            if self._slots is None:
                self._slots = Slots(max(1, self._runner.loaded.slots))
            return self._slots

    def _template(self) -> Renderer:
        with self._lock:
            if self._closed:
                raise RbeeError("The worker is shutting down")
            if self._renderer is None:
                self._renderer = Renderer(self._backend.chat_template(), self._backend.special_tokens())
            return self._renderer


class Presence:
    """Whether somebody still wants the answer; the socket is looked at every 50 ms at most."""

    def __init__(self, request: Request, runner: Runner) -> None:
        self._request = request
        self._runner = runner
        self._next = 0.0
        self._gone = False

    def gone(self) -> bool:
        """Return True when the client has left or the worker ends."""
        now = time.monotonic()
        if not self._gone and now >= self._next:
            self._next = now + LOOK_S
            self._gone = self._runner.ending() or self._request.gone()
        return self._gone

    def refuse(self) -> None:
        """Raises: ClientLeft, or WorkerLost when the worker ends, if the answer was given up."""
        if self._gone and self._runner.ending():
            raise WorkerLost("The worker was stopped before its answer was whole", hint="the same request again")
        if self._gone:
            raise ClientLeft


class _Held:
    """A streamed body that keeps its slot until it ends or is closed, also before its first byte."""

    def __init__(self, body: Any, held: contextlib.ExitStack) -> None:
        self._body = body
        self._held = held

    def __iter__(self) -> Iterator[bytes]:
        with self._held:
            yield from self._body

    def close(self) -> None:
        self._body.close()
        self._held.close()


def _present(wanted: Generation, steps: Generator[Step, None, None], body: Body) -> Response:
    if not wanted.stream:
        for choice, step in steps:
            body.add(choice, step)
        return reply(body.whole())
    # The first step is taken before the head is sent, so that an engine that fails at once is told by its status.
    first = next(steps)
    events = _events(itertools.chain([first], steps), body)
    return Response(events, content_type="text/event-stream", headers={"Cache-Control": "no-cache, no-transform"})


def _events(steps: Iterator[Step], body: Body) -> Iterator[bytes]:
    try:
        for choice, step in steps:
            for chunk in body.chunks(choice, step):
                yield b"data: " + chunk + b"\n\n"
        for chunk in body.last_chunks():
            yield b"data: " + chunk + b"\n\n"
        yield DONE
    except ClientLeft:
        return
    except Exception as problem:  # noqa: BLE001  a backend may raise anything; the head is sent already
        yield error_event(as_error(problem))


def as_error(problem: Exception) -> RbeeError:
    """Return what a client is told of an engine's exception: its own fault, or the engine's."""
    if isinstance(problem, RbeeError):
        return problem
    if isinstance(problem, NotImplementedError):
        return NotSupported(str(problem) or "The engine cannot do this")
    text = " ".join(str(problem).split())[:500] or type(problem).__name__
    if isinstance(problem, ValueError):
        return InvalidRequest(text)
    # Where it broke, without the words: they may hold a part of the prompt.
    where = "".join(traceback.format_tb(problem.__traceback__))
    log.error("the engine raised %s\n%s", type(problem).__name__, where)
    return WorkerLost(f"The engine failed in the middle of this job: {text}")


def without_second_start(tokens: list[int], text: str, start: str) -> list[int]:
    """Drop the start token that a tokenizer put before the one that the chat template wrote."""
    if start and text.startswith(start) and len(tokens) > 1 and tokens[0] == tokens[1]:
        return tokens[1:]
    return tokens


def _schema(wanted: ChatRequest) -> dict[str, object] | None:
    """Return the JSON schema that the answer must follow. Raises: InvalidRequest."""
    form = wanted.response_format or {}
    if form.get("type") == "json_object":
        return {"type": "object"}
    if form.get("type") != "json_schema":
        return None
    named = form.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise InvalidRequest("response_format has no json_schema.schema", param="response_format.json_schema.schema")
    return schema


def _sampling(
    wanted: Generation, limit: int, stop: tuple[str, ...], schema: dict[str, object] | None, copy: int
) -> Sampling:
    """Take from the request what it says; what it does not say keeps the contract's defaults."""
    names = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")
    said = {name: value for name in names if (value := getattr(wanted, name)) is not None}
    try:
        bias = {int(token): value for token, value in (wanted.logit_bias or {}).items()}
    except ValueError:
        raise InvalidRequest("the keys of logit_bias are token ids", param="logit_bias") from None
    # Copies of one answer must differ, and be the same again with the same seed.
    seed = None if wanted.seed is None else wanted.seed + copy
    max_tokens = None if limit == NO_LIMIT else limit
    return Sampling(max_tokens=max_tokens, seed=seed, stop=stop, logit_bias=bias, json_schema=schema, **said)


def _encoded(vector: list[float], form: str | None) -> list[float] | str:
    if form != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _document(value: str | dict[str, Any], where: str) -> str:
    text = value if isinstance(value, str) else value.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{where} is neither a text nor an object with a text", param=where)
    return text
