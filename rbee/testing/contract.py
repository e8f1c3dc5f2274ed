"""The conformance tests that every backend passes, in a real worker process and over HTTP."""

from __future__ import annotations

import contextlib
import math
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import msgspec
import pytest

from rbee.errors import InvalidInput, RbeeError
from rbee.testing.programs import until
from rbee.testing.workers import RunningWorker, run_worker
from rbee.wire.errors import UpstreamError
from rbee.wire.fleet import EngineReport, WorkerSpec

QUESTION = "How do I add a machine?"
UNICODE = "Grüße, 蜜蜂 🐝 naïve"


class BackendContract:
    """Subclass it with a fixture `spec` that returns the `WorkerSpec` of a small model.

    A test is skipped only where the worker says that the model cannot do it; `needed` names what it must be able to.
    `long_answer` are request fields that make the answer take long enough to be cancelled.
    """

    needed: ClassVar[frozenset[str]] = frozenset({"chat"})
    long_answer: ClassVar[dict[str, Any]] = {"max_tokens": 100_000}

    @pytest.fixture(scope="class")
    @classmethod
    def worker(cls, spec: WorkerSpec) -> Iterator[RunningWorker]:
        with run_worker(spec) as worker:
            yield worker

    @pytest.fixture
    def able(self, worker: RunningWorker) -> frozenset[str]:
        return _able(worker)

    @pytest.fixture
    def ask(self, worker: RunningWorker, able: frozenset[str]) -> Callable[..., dict[str, Any]]:
        """Return a function that asks for a chat or a completion and returns text, finish_reason and usage."""

        def ask(prompt: str, **fields: Any) -> dict[str, Any]:
            path, body = _request(worker, able, prompt, fields)
            answer = worker.post(path, body)
            choice = answer["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            return {"text": text, "finish_reason": choice["finish_reason"], "usage": answer["usage"]}

        return ask

    def test_it_describes_itself(self, spec: WorkerSpec) -> None:
        command = [sys.executable, "-m", "rbee.worker", "plugins", "--json"]
        listed = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
        reports = msgspec.json.decode(listed, type=list[EngineReport])
        report = next(one for one in reports if one.name == spec.backend)
        assert report.problem == ""
        assert report.capabilities
        assert report.version
        assert report.summary
        assert "\n" not in report.summary

    def test_it_can_what_it_must(self, able: frozenset[str]) -> None:
        assert self.needed <= able

    def test_what_it_cannot_is_refused_by_name(self, worker: RunningWorker, able: frozenset[str]) -> None:
        for capability, (path, body) in _SMALLEST.items():
            if capability not in able:
                with pytest.raises(RbeeError) as refused:
                    worker.post(path, {"model": worker.spec.model, **body})
                assert refused.value.status == 400
                assert worker.spec.model in refused.value.message

    def test_the_same_request_gives_the_same_text(self, ask: Callable[..., dict[str, Any]]) -> None:
        fields = {"temperature": 0, "seed": 7, "max_tokens": 24}
        assert ask(QUESTION, **fields)["text"] == ask(QUESTION, **fields)["text"]

    def test_a_stream_says_what_the_whole_answer_says(
        self, worker: RunningWorker, able: frozenset[str], ask: Callable[..., dict[str, Any]]
    ) -> None:
        fields = {"temperature": 0, "seed": 7, "max_tokens": 24}
        whole = ask(QUESTION, **fields)
        streamed = _stream(worker, able, QUESTION, {**fields, "stream_options": {"include_usage": True}})
        assert streamed["text"] == whole["text"]
        assert streamed["finish_reason"] == whole["finish_reason"]
        assert streamed["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
        assert streamed["done"] == "[DONE]"

    def test_max_tokens_cuts_the_answer(self, ask: Callable[..., dict[str, Any]]) -> None:
        answer = ask(QUESTION, temperature=0, max_tokens=2)
        assert answer["usage"]["completion_tokens"] == 2
        assert answer["finish_reason"] == "length"

    def test_a_stop_sequence_ends_the_answer_and_is_not_in_it(self, ask: Callable[..., dict[str, Any]]) -> None:
        whole = ask(QUESTION, temperature=0, max_tokens=24)["text"]
        stop = whole[len(whole) // 2 :][:4]
        answer = ask(QUESTION, temperature=0, max_tokens=24, stop=[stop])
        assert answer["text"] == whole[: whole.index(stop)]
        assert answer["finish_reason"] == "stop"

    def test_several_jobs_at_once_are_whole_and_as_if_alone(self, ask: Callable[..., dict[str, Any]]) -> None:
        prompts = [f"{QUESTION} {'again ' * number}" for number in range(6)]
        fields = {"temperature": 0, "seed": 7, "max_tokens": 32}
        alone = [ask(prompt, **fields)["text"] for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            together = list(pool.map(lambda prompt: ask(prompt, **fields)["text"], prompts))
        assert together == alone

    def test_text_of_any_script_comes_through(self, ask: Callable[..., dict[str, Any]]) -> None:
        answer = ask(UNICODE, temperature=0, max_tokens=16)
        assert isinstance(answer["text"], str)
        assert answer["usage"]["prompt_tokens"] > 0

    def test_an_empty_prompt_is_answered_or_refused_but_never_breaks(
        self, worker: RunningWorker, ask: Callable[..., dict[str, Any]]
    ) -> None:
        with contextlib.suppress(InvalidInput, UpstreamError):
            ask("", max_tokens=4)
        assert worker.health().status == "ready"
        assert ask(QUESTION, max_tokens=2)["text"]

    def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(
        self, worker: RunningWorker, ask: Callable[..., dict[str, Any]]
    ) -> None:
        context = worker.health().context_tokens
        if not context:
            pytest.skip("this model has no limit")
        with pytest.raises(RbeeError) as refused:
            ask("too long " * context, max_tokens=4)
        assert refused.value.status == 400
        assert refused.value.code == "context_length_exceeded"
        assert str(context) in refused.value.message
        assert ask(QUESTION, max_tokens=2)["text"]

    def test_max_tokens_beyond_the_context_is_clipped(self, ask: Callable[..., dict[str, Any]]) -> None:
        assert ask(QUESTION, temperature=0, max_tokens=2**31 - 1, stop=["e"])["finish_reason"] in ("stop", "length")

    @pytest.mark.parametrize("streamed", [True, False], ids=["streaming", "whole"])
    def test_a_client_that_leaves_frees_its_place(
        self, worker: RunningWorker, able: frozenset[str], ask: Callable[..., dict[str, Any]], streamed: bool
    ) -> None:
        slots = worker.health().slots
        fields = {**self.long_answer, "stream": streamed, "temperature": 0}
        path, body = _request(worker, able, QUESTION, fields)
        connections = [_begin(worker, path, body) for _ in range(slots)]
        until(lambda: worker.health().in_flight == slots, "the jobs to begin")
        for connection in connections:
            connection.close()
        until(lambda: worker.health().in_flight == 0, "the places of the clients that left")
        assert ask(QUESTION, max_tokens=2)["text"]

    def test_embeddings_are_vectors_of_one_length(self, worker: RunningWorker, able: frozenset[str]) -> None:
        if "embedding" not in able:
            pytest.skip("this model does not embed")
        body = {"model": worker.spec.model, "input": ["honey", "honey", "a queue of jobs"]}
        one, same, other = (row["embedding"] for row in worker.post("/v1/embeddings", body)["data"])
        assert len(one) == len(other) > 0
        assert one == pytest.approx(same, abs=1e-4)
        assert all(map(math.isfinite, one + other))
        assert one != pytest.approx(other, abs=1e-4)

    def test_rerank_scores_every_document_once(self, worker: RunningWorker, able: frozenset[str]) -> None:
        if "rerank" not in able:
            pytest.skip("this model does not rank")
        documents = ["bees make honey", "a queue of jobs", "honey and bees"]
        body = {"model": worker.spec.model, "query": "honey", "documents": documents}
        results = worker.post("/v1/rerank", body)["results"]
        assert sorted(row["index"] for row in results) == [0, 1, 2]
        scores = [row["relevance_score"] for row in results]
        assert scores == sorted(scores, reverse=True)

    def test_it_ends_when_told(self, spec: WorkerSpec) -> None:
        with run_worker(spec) as worker:
            worker.signal(signal.SIGTERM)
            assert worker.wait() == 0
            assert "Traceback" not in worker.log


_SMALLEST: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    "completion": ("/v1/completions", {"prompt": "x"}),
    "embedding": ("/v1/embeddings", {"input": "x"}),
    "rerank": ("/v1/rerank", {"query": "x", "documents": ["x"]}),
}


def _able(worker: RunningWorker) -> frozenset[str]:
    models = worker.client.get("/v1/models", dict[str, Any])
    return frozenset(models["data"][0]["rbee"]["capabilities"])


def _request(
    worker: RunningWorker, able: frozenset[str], prompt: str, fields: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    if "chat" in able:
        messages = [{"role": "user", "content": prompt}]
        return "/v1/chat/completions", {"model": worker.spec.model, "messages": messages, **fields}
    if "completion" in able:
        return "/v1/completions", {"model": worker.spec.model, "prompt": prompt, **fields}
    pytest.skip("this model does not generate text")


def _stream(worker: RunningWorker, able: frozenset[str], prompt: str, fields: dict[str, Any]) -> dict[str, Any]:
    path, body = _request(worker, able, prompt, fields)
    found: dict[str, Any] = {"text": ""}
    for event in worker.stream(path, body):
        found |= {key: event[key] for key in ("done", "usage") if event.get(key)}
        for choice in event.get("choices", []):
            delta = choice.get("delta") or choice
            found["text"] += delta.get("content") or delta.get("text") or ""
            found["finish_reason"] = choice["finish_reason"] or found.get("finish_reason")
    return found


def _begin(worker: RunningWorker, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request over a connection of its own, without waiting for the answer."""
    host, _, port = worker.url.removeprefix("http://").rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    data = msgspec.json.encode(body)
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {worker.spec.token}\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection
