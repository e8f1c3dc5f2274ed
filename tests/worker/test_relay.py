"""What stands before a serving engine: bytes flow through, clients that leave are noticed, errors have one form."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import openai
import pytest

from rbee.http.upstream import Answer, Upstream
from rbee.testing import RunningWorker, run_worker
from rbee.testing.programs import until
from rbee.wire.fleet import WorkerSpec


@pytest.fixture(scope="module")
def engine_socket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("e") / "e.sock"


@pytest.fixture(scope="module")
def reached(demo_spec: WorkerSpec, engine_socket: Path) -> Iterator[RunningWorker]:
    """Return a worker whose engine the test can reach as well."""
    with run_worker(msgspec.structs.replace(demo_spec, engine_socket=str(engine_socket))) as worker:
        yield worker


@pytest.fixture(scope="module")
def engine(reached: RunningWorker, engine_socket: Path) -> Iterator[Upstream]:
    """Return a connection to that engine itself."""
    found = Upstream(f"unix:{engine_socket}", token=reached.spec.token)
    yield found
    found.close()


def ask(**fields: object) -> bytes:
    messages = [{"role": "user", "content": "How do I add a machine?"}]
    return json.dumps({"model": "rbee-demo", "messages": messages, "temperature": 0, **fields}).encode()


def normal(answer: Answer) -> list[bytes]:
    """Return the lines of a stream without what differs from one answer to the next."""
    drop = (b'"id"', b'"created"', b"cache", b"_ms", b"per_second", b"prompt_n")
    return [part for part in answer.read().replace(b"\n", b",").split(b",") if not any(one in part for one in drop)]


def test_a_stream_passes_byte_for_byte(reached: RunningWorker, engine: Upstream) -> None:
    body = ask(stream=True, max_tokens=12, stream_options={"include_usage": True})
    direct = engine.request("POST", "/v1/chat/completions", body)
    relayed = reached.send("/v1/chat/completions", body)
    assert relayed.headers["content-type"] == direct.headers["content-type"]
    assert normal(relayed) == normal(direct)


def test_the_engine_itself_checks_the_token(reached: RunningWorker, engine_socket: Path) -> None:
    for token in ("", "wrong"):
        stranger = Upstream(f"unix:{engine_socket}", token=token)
        answer = stranger.request("POST", "/v1/chat/completions", ask())
        assert answer.status == 401
        answer.close()
    assert engine_socket.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engines_slot(slow_spec: WorkerSpec, stream: bool) -> None:
    with run_worker(slow_spec) as worker:
        connection = socket.create_connection(("127.0.0.1", int(worker.url.rpartition(":")[2])), timeout=60)
        body = ask(model="slow", stream=stream, max_tokens=4000)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {worker.spec.token}\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: busy(worker) == 1, "the job to begin")
        connection.close()
        until(lambda: busy(worker) == 0, "the slot to be free")
        # The engine frees its slot when the connection to it closes; the worker counts the job after that.
        counted = 'endpoint="/v1/chat/completions",status="cancelled"} 1'
        until(lambda: counted in worker.send("/metrics", b"", method="GET").read().decode(), "the job to be counted")


def busy(worker: RunningWorker) -> int:
    return sum(slot["is_processing"] for slot in json.loads(worker.send("/slots", b"", method="GET").read()))


def test_a_stopped_engine_does_not_silence_health(reached: RunningWorker) -> None:
    (pid,) = reached.children()
    os.kill(pid, signal.SIGSTOP)
    try:
        assert reached.health().status == "ready"
    finally:
        os.kill(pid, signal.SIGCONT)


def test_what_only_the_engine_knows_is_reached_through_the_worker(reached: RunningWorker) -> None:
    assert len(json.loads(reached.send("/slots", b"", method="GET").read())) == 4
    tokens = json.loads(reached.send("/tokenize", b'{"content": "hello"}').read())["tokens"]
    assert json.loads(reached.send("/detokenize", json.dumps({"tokens": tokens}).encode()).read())["content"] == "hello"


def test_metrics_count_jobs_and_tokens_and_carry_the_engines_own(reached: RunningWorker) -> None:
    reached.chat("hi", max_tokens=3)
    text = reached.send("/metrics", b"", method="GET").read().decode()
    assert (
        'rbee_worker_jobs_total{model="rbee-demo",backend="xllamacpp",endpoint="/v1/chat/completions",status="200"}'
        in text
    )
    assert 'direction="output"}' in text
    assert "llamacpp:" in text


def test_all_endpoints_of_the_engine_answer(reached: RunningWorker) -> None:
    response = reached.post("/v1/responses", {"model": "rbee-demo", "input": "hi", "max_output_tokens": 4})
    assert (response["object"], response["status"]) == ("response", "incomplete")
    messages = [{"role": "user", "content": "hi"}]
    message = reached.post("/v1/messages", {"model": "rbee-demo", "messages": messages, "max_tokens": 4})
    assert (message["type"], message["stop_reason"], message["usage"]["output_tokens"]) == ("message", "max_tokens", 4)
    stopped = reached.post(
        "/v1/messages", {"model": "rbee-demo", "messages": messages, "max_tokens": 40, "stop_sequences": ["e"]}
    )
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "e")
    counted = reached.post("/v1/messages/count_tokens", {"model": "rbee-demo", "messages": messages})
    assert counted["input_tokens"] > 0


def test_the_openai_package_streams_tools_and_schemas(reached: RunningWorker) -> None:
    with openai.OpenAI(base_url=f"{reached.url}/v1", api_key=reached.spec.token, max_retries=0) as api:
        schema: dict[str, object] = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        answer = api.chat.completions.create(
            model="rbee-demo",
            messages=[{"role": "user", "content": "a number"}],
            response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
            temperature=0,
        )
        assert isinstance(json.loads(answer.choices[0].message.content or "")["n"], int)
        with api.responses.stream(model="rbee-demo", input="hi", max_output_tokens=8) as events:
            text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
            assert text


def test_an_embedding_model_without_embeddings_is_not_pretended(reached: RunningWorker) -> None:
    answer = reached.send("/v1/embeddings", b'{"model": "rbee-demo", "input": "x"}')
    assert answer.status == 400
    assert "rbee-demo" in json.loads(answer.read())["error"]["message"]
