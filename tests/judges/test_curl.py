"""curl as people type it: `-d` and no Content-Type, which makes curl call JSON a form."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from rbee.testing.programs import RunningQueen

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
HELLO = '{"model": "rbee-demo", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}'


def curl(*arguments: str) -> str:
    done = subprocess.run(["curl", "--silent", "--show-error", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def curl_json(*arguments: str) -> Any:
    return json.loads(curl(*arguments))


def test_a_chat_without_a_content_type(queen: RunningQueen) -> None:
    answer = curl_json(f"{queen.url}/v1/chat/completions", "-d", HELLO)
    assert answer["choices"][0]["message"]["content"]


def test_a_chat_with_a_content_type(queen: RunningQueen) -> None:
    answer = curl_json(f"{queen.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", HELLO)
    assert answer["choices"][0]["message"]["content"]


def test_a_stream_shows_its_events(queen: RunningQueen) -> None:
    body = HELLO[:-1] + ', "stream": true}'
    text = curl("--no-buffer", f"{queen.url}/v1/chat/completions", "-d", body)
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", '{"model": "rbee-demo", "prompt": "rbee is", "max_tokens": 4}', "choices"),
        ("/v1/embeddings", '{"model": "echo", "input": "a machine"}', "data"),
        ("/v1/rerank", '{"model": "echo", "query": "hive", "documents": ["a hive", "a queen"]}', "results"),
        ("/v1/responses", '{"model": "rbee-demo", "input": "Hello!", "max_output_tokens": 8}', "output"),
        (
            "/v1/messages",
            '{"model": "rbee-demo", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]}',
            "content",
        ),
    ],
)
def test_the_other_endpoints_without_a_content_type(queen: RunningQueen, path: str, body: str, field: str) -> None:
    assert curl_json(f"{queen.url}{path}", "-d", body)[field]


def test_the_models(queen: RunningQueen) -> None:
    assert "rbee-demo" in {model["id"] for model in curl_json(f"{queen.url}/v1/models")["data"]}


def test_a_mistake_is_explained(queen: RunningQueen) -> None:
    text = curl("--write-out", "\n%{http_code}", f"{queen.url}/v1/chat/completions", "-d", "{'model': 'rbee-demo'}")
    body, _, status = text.rpartition("\n")
    assert status == "400"
    assert "not valid JSON" in json.loads(body)["error"]["message"]


def test_a_body_from_a_pipe_in_chunks(queen: RunningQueen) -> None:
    chunked = ["-H", "Transfer-Encoding: chunked", "-d", HELLO]
    assert curl_json(f"{queen.url}/v1/chat/completions", *chunked)["choices"]


def test_a_body_that_curl_announces_first(queen: RunningQueen) -> None:
    assert curl_json(f"{queen.url}/v1/chat/completions", "-H", "Expect: 100-continue", "-d", HELLO)["choices"]


def test_only_the_head(queen: RunningQueen) -> None:
    assert curl("--head", f"{queen.url}/health").startswith("HTTP/1.1 ")
