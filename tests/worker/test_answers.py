"""OpenAI's HTTP for an engine that is a library."""

from __future__ import annotations

import base64
import json
import socket
import struct

import openai
import pytest

from rbee.errors import RbeeError
from rbee.testing import RunningWorker, run_worker
from rbee.testing.programs import until
from rbee.testing.workers import ANSWER_S
from rbee.wire.fleet import WorkerSpec


def client(worker: RunningWorker) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{worker.url}/v1", api_key=worker.spec.token, max_retries=0)


def failing(mode: str) -> WorkerSpec:
    return WorkerSpec(name="echo", backend="echo", model="echo", options={"fail": mode})


def test_the_openai_package_reads_a_stream(echo: RunningWorker) -> None:
    with client(echo) as api:
        chunks = list(
            api.chat.completions.create(
                model="echo",
                messages=[{"role": "user", "content": "one two three"}],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert [text for text in texts if text] == ["one", " two", " three"]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    usage = chunks[-1].usage
    assert usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (13, 3, 16)


def test_n_answers_come_with_one_prompt_counted(echo: RunningWorker) -> None:
    answer = echo.chat("one two", n=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {"one two"}
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}


def test_several_prompts_are_completed_in_order(echo: RunningWorker) -> None:
    answer = echo.post("/v1/completions", {"model": "echo", "prompt": ["one", "two words"], "n": 2})
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == ["one", "one", "two words", "two words"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]


def test_token_ids_are_taken_as_a_prompt(echo: RunningWorker) -> None:
    answer = echo.post("/v1/completions", {"model": "echo", "prompt": list(b"by number")})
    assert answer["choices"][0]["text"] == "by number"


@pytest.mark.parametrize("stop", ["wo th", ["zzz", "wo th"]])
def test_a_stop_sequence_over_two_tokens_is_cut_out(echo: RunningWorker, stop: str | list[str]) -> None:
    answer = echo.chat("one two three", stop=stop)["choices"][0]
    assert answer["message"]["content"] == "one t"
    assert answer["finish_reason"] == "stop"
    parts = echo.stream("/v1/chat/completions", {"model": "echo", "messages": [user("one two three")], "stop": stop})
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts if "choices" in part) == "one t"


def test_content_in_parts_is_joined(echo: RunningWorker) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer = echo.post("/v1/chat/completions", {"model": "echo", "messages": [{"role": "user", "content": parts}]})
    assert answer["choices"][0]["message"]["content"] == "one\ntwo"


def test_embeddings_come_as_numbers_or_base64(echo: RunningWorker) -> None:
    plain = echo.post("/v1/embeddings", {"model": "echo", "input": "some honey"})
    packed = echo.post("/v1/embeddings", {"model": "echo", "input": "some honey", "encoding_format": "base64"})
    vector = plain["data"][0]["embedding"]
    assert struct.unpack(f"<{len(vector)}f", base64.b64decode(packed["data"][0]["embedding"])) == pytest.approx(vector)
    assert plain["usage"]["prompt_tokens"] == len("some honey")


def test_rerank_returns_the_best_documents(echo: RunningWorker) -> None:
    body = {
        "model": "echo",
        "query": "wild honey",
        "documents": ["a queue", "wild honey", {"text": "honey"}],
        "top_n": 2,
    }
    results = echo.post("/v1/rerank", {**body, "return_documents": True})["results"]
    assert [(row["index"], row["document"]["text"]) for row in results] == [(1, "wild honey"), (2, "honey")]


def test_execute_streams_plain_tokens(worker: RunningWorker) -> None:
    body = {"prompt": "How do I add a machine?", "max_tokens": 5, "temperature": 0}
    *steps, last = worker.stream("/execute", body)
    assert "".join(step["token"] for step in steps) == last["text"] != ""
    assert last["done"] is True
    assert last["usage"]["completion_tokens"] == 5
    assert worker.post("/execute", {**body, "stream": False})["text"] == last["text"]


def test_an_engine_that_fails_at_once_is_told_by_the_status() -> None:
    with run_worker(failing("first")) as worker:
        for stream in (False, True):
            with pytest.raises(RbeeError, match="fail=first") as failed:
                worker.chat("one two", stream=stream)
            assert failed.value.status == 502
        assert worker.health().status == "ready"


def test_an_engine_that_fails_in_the_middle_ends_the_stream_with_an_error() -> None:
    with run_worker(failing("middle")) as worker:
        body = {"model": "echo", "messages": [user("one two")]}
        *_, text, last = worker.stream("/v1/chat/completions", body)
        assert text["choices"][0]["delta"]["content"] == "one"
        assert last["error"]["code"] == "worker_lost"
        with client(worker) as api, pytest.raises(openai.APIError, match="fail=middle"):
            list(api.chat.completions.create(model="echo", messages=[{"role": "user", "content": "a b"}], stream=True))
        until(lambda: 'status="broken"} 2' in metrics(worker), "the count of broken answers")


def test_a_job_whose_client_left_while_it_waited_never_runs() -> None:
    spec = WorkerSpec(name="echo", backend="echo", model="echo", slots=1, options={"fail": "hang"})
    with run_worker(spec) as worker:
        body = json.dumps({"model": "echo", "messages": [user("a b")]}).encode()
        first, second = raw_request(worker, body), raw_request(worker, body)
        until(lambda: "rbee_worker_jobs_waiting{" in metrics(worker) and waiting(worker) == 1, "one job to wait")
        second.close()
        until(lambda: waiting(worker) == 0, "the waiting job to be given up")
        until(lambda: worker.health().in_flight == 1, "the job that gave up waiting to be counted out")
        first.close()
        until(lambda: worker.health().in_flight == 0, "the running job to be given up")


def test_prompts_are_never_logged(echo: RunningWorker) -> None:
    echo.chat("canary-7f3a9 in a prompt")
    with pytest.raises(RbeeError):
        echo.chat("canary-7f3a9 " * 2000)
    assert "canary-7f3a9" not in echo.log


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def metrics(worker: RunningWorker) -> str:
    return worker.client.send("GET", "/metrics").read().decode()


def waiting(worker: RunningWorker) -> int:
    line = next(line for line in metrics(worker).splitlines() if line.startswith("rbee_worker_jobs_waiting{"))
    return int(line.split()[-1])


def raw_request(worker: RunningWorker, body: bytes) -> socket.socket:
    """Send a request over a connection of its own, without waiting for the answer."""
    host, _, port = worker.url.removeprefix("http://").rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=ANSWER_S)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {worker.spec.token}\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection
