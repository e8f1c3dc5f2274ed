"""The reference backend keeps the contract, and does what its options say."""

from __future__ import annotations

import pytest

from rbee.testing import BackendContract, run_worker
from rbee.wire.fleet import WorkerSpec


class TestEcho(BackendContract):
    """A delay makes an answer long enough to leave it."""

    needed = frozenset({"chat", "completion", "embedding", "rerank"})

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> WorkerSpec:
        return WorkerSpec(name="echo", backend="echo", model="echo", options={"delay_ms": "30"})


def test_it_says_the_last_user_message_back() -> None:
    with run_worker(WorkerSpec(name="echo", backend="echo", model="echo")) as worker:
        messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        messages += [{"role": "user", "content": "three  four\n"}]
        answer = worker.post("/v1/chat/completions", {"model": "echo", "messages": messages})
        assert answer["choices"][0]["message"]["content"] == "three  four\n"
        assert answer["choices"][0]["finish_reason"] == "stop"
