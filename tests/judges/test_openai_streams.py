"""The real `openai` package leaves early, loses patience, and asks eight things at once."""

from __future__ import annotations

import asyncio
import re
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from urllib.parse import urlsplit

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from rbee_judges import HANG_GUARD_S, StartEcho, connect, spawn_echo

from rbee.client import Client
from rbee.testing.programs import RunningQueen, running_queen, until
from rbee.wire.fleet import HiveReport, WorkerHealth

ENDLESS = "word " * 1500
"""With 200 ms a word, five minutes: a worker that is idle before has stopped because it was told to."""


@pytest.fixture
def impatient(own_queen: RunningQueen) -> Iterator[openai.OpenAI]:
    with connect(own_queen.url) as made:
        yield made


def says(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def outcomes(queen: RunningQueen, outcome: str) -> float:
    """Return how many jobs the queen has seen end in this way."""
    with urllib.request.urlopen(f"{queen.url}/metrics", timeout=HANG_GUARD_S) as page:
        text = page.read().decode()
    return sum(float(n) for n in re.findall(rf'^rbee_jobs_total{{.*outcome="{outcome}".*}} (\S+)$', text, re.M))


def client_of(queen: RunningQueen, worker: str) -> Client:
    """Return a client of a worker with its token."""
    report = queen.client_of_hive().get("/v1/hive", HiveReport)
    (access,) = [found.access for found in report.workers if found.name == worker]
    assert access is not None
    return Client(access.url, token=access.token)


def jobs_of(worker: Client) -> int:
    return worker.get("/health", WorkerHealth).in_flight


def is_idle(queen: RunningQueen, worker: str) -> bool:
    """Ask the queen and the worker itself."""
    return queen.status().in_flight == 0 and jobs_of(client_of(queen, worker)) == 0


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_stream_closed_early_is_ended_at_the_worker(
    own_queen: RunningQueen, start_echo: StartEcho, impatient: openai.OpenAI, endpoint: str
) -> None:
    worker = start_echo(delay_ms="200")
    before = outcomes(own_queen, "cancelled")
    if endpoint == "chat":
        chat = impatient.chat.completions.create(model="echo", messages=says(ENDLESS), stream=True)
        next(chat)
        assert not is_idle(own_queen, worker)
        chat.close()
    else:
        text = impatient.completions.create(model="echo", prompt=ENDLESS, stream=True)
        next(text)
        assert not is_idle(own_queen, worker)
        text.close()
    until(lambda: is_idle(own_queen, worker), "the worker to be idle")
    assert outcomes(own_queen, "cancelled") == before + 1


def test_a_client_out_of_patience_frees_the_worker(
    own_queen: RunningQueen, start_echo: StartEcho, impatient: openai.OpenAI
) -> None:
    worker = start_echo(fail="hang")
    before = outcomes(own_queen, "cancelled")
    with pytest.raises(openai.APITimeoutError):
        impatient.with_options(timeout=0.5).chat.completions.create(model="echo", messages=says("hello"))
    with pytest.raises(openai.APITimeoutError):
        impatient.with_options(timeout=0.5).chat.completions.create(model="echo", messages=says("hello"), stream=True)
    until(lambda: is_idle(own_queen, worker), "the worker to be idle")
    assert outcomes(own_queen, "cancelled") == before + 2


def test_the_real_engine_stops_when_its_reader_leaves(queen: RunningQueen, client: openai.OpenAI) -> None:
    before = outcomes(queen, "cancelled")
    # Twenty rivals a token make this answer larger than all the buffers between the engine and this test.
    stream = client.chat.completions.create(
        model="rbee-demo",
        messages=says("How do I add a machine?"),
        n=4,
        logprobs=True,
        top_logprobs=20,
        max_tokens=1900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    stream.close()
    until(lambda: is_idle(queen, "rbee-demo"), "the worker to be idle")
    assert outcomes(queen, "cancelled") == before + 1
    until(lambda: not busy_slots(queen), "the engine's slots to be free")
    answer = client.chat.completions.create(model="rbee-demo", messages=says("Hello"), max_tokens=4)
    assert answer.choices[0].message.content


def busy_slots(queen: RunningQueen) -> list[int]:
    """Ask llama.cpp itself, through its worker, which of its slots compute."""
    slots = client_of(queen, "rbee-demo").get("/slots", list[dict[str, object]])
    return [index for index, slot in enumerate(slots) if slot["is_processing"]]


def test_eight_streams_at_once_are_all_whole(
    own_queen: RunningQueen, start_echo: StartEcho, impatient: openai.OpenAI
) -> None:
    start_echo(delay_ms="5")
    texts = [" ".join(f"{name}{number}" for number in range(60)) for name in "abcdefgh"]
    assert asyncio.run(ask_all(own_queen, "echo", texts)) == [(text, "stop", 60) for text in texts]


def test_the_real_engine_gives_eight_whole_streams_at_once(queen: RunningQueen) -> None:
    things = ["rbee", "a hive", "the queen", "a worker", "a plugin", "a model", "an inventory", "a script"]
    questions = [f"What is {thing}?" for thing in things]
    answers = asyncio.run(ask_all(queen, "rbee-demo", questions))
    assert len(answers) == 8
    for text, finish_reason, tokens in answers:
        assert text
        assert finish_reason in ("stop", "length")
        assert tokens > 0


async def ask_all(queen: RunningQueen, model: str, texts: list[str]) -> list[tuple[str, str, int]]:
    address = f"{queen.url}/v1"
    async with openai.AsyncOpenAI(base_url=address, api_key="local", max_retries=0, timeout=HANG_GUARD_S) as client:
        return await asyncio.gather(*(ask(client, model, text) for text in texts))


async def ask(client: openai.AsyncOpenAI, model: str, text: str) -> tuple[str, str, int]:
    """Return the text, how it ended, and how many tokens it had."""
    stream = await client.chat.completions.create(
        model=model, messages=says(text), stream=True, stream_options={"include_usage": True}
    )
    parts, ends, tokens = [], [], 0
    async for chunk in stream:
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            ends += [choice.finish_reason] if choice.finish_reason else []
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    assert len(ends) == 1
    return "".join(parts), ends[0], tokens


def test_a_queen_told_to_end_closes_idle_connections_while_a_stream_goes_on() -> None:
    with running_queen() as queen, connect(queen.url) as client, connection(queen) as idle:
        worker = client_of(queen, spawn_echo(queen, delay_ms="200"))
        idle.request("GET", "/health")
        idle.getresponse().read()
        stream = client.chat.completions.create(model="echo", messages=says(ENDLESS), stream=True)
        next(stream)
        queen.process.send_signal(signal.SIGTERM)
        assert idle.sock.recv(1) == b"", "clients keep their connections, and would hold up the queen's end"
        assert jobs_of(worker) == 1, "the stream was not left alone"
        stream.close()


def connection(queen: RunningQueen) -> closing[HTTPConnection]:
    return closing(HTTPConnection(urlsplit(queen.url).netloc, timeout=HANG_GUARD_S))
