"""The real `openai` package raises the right class for each refusal, with words that help."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from rbee_judges import StartEcho, connect

from rbee.testing.programs import RunningQueen, running_queen

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "one two three"}]
IMAGE: list[ChatCompletionMessageParam] = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
        ],
    }
]


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean 'rbee-demo'") as refused:
        client.chat.completions.create(model="rbee-dmeo", messages=HI)
    assert refused.value.code == "model_not_found"
    assert refused.value.param == "model"
    assert refused.value.type == "invalid_request_error"


def test_an_endpoint_that_is_not_there_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"openapi\.json"):
        client.moderations.create(input="x")


def test_a_wrong_field_is_a_bad_request_that_names_it(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="echo", messages=HI, temperature=9)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="echo", messages=[])
    assert refused.value.param == "messages"


def test_a_refusal_comes_the_same_way_when_a_stream_was_asked_for(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="echo", messages=HI, temperature=9, stream=True)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=HI, stream=True)


def test_a_prompt_over_the_context_is_a_bad_request(client: openai.OpenAI) -> None:
    long: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How do I add a machine? " * 4000}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="rbee-demo", messages=long)
    assert refused.value.code == "context_length_exceeded"


def test_an_image_is_refused_by_a_model_without_vision(client: openai.OpenAI, queen: RunningQueen) -> None:
    workers = len(queen.status().hives[0].workers)
    for _ in range(3):
        with pytest.raises(openai.BadRequestError, match="vision"):
            client.chat.completions.create(model="rbee-demo", messages=IMAGE)
    assert len(queen.status().hives[0].workers) <= max(workers, 1), "a worker was started that cannot see either"


def test_a_wrong_key_of_ours_is_refused_on_loopback_too(queen: RunningQueen) -> None:
    with connect(queen.url, "rbee_sk_wrong") as client, pytest.raises(openai.AuthenticationError, match="rbee key"):
        client.models.list()


def test_a_page_of_another_origin_needs_a_real_key(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.models.list(extra_headers={"Origin": "https://evil.example"})


def test_off_loopback_only_a_key_opens(tmp_path: Path) -> None:
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address but the loopback one")
    with running_queen("--host", "0.0.0.0", home=tmp_path) as queen:
        url = f"http://{address}:{urlsplit(queen.url).port}"
        for key in ("local", "rbee_sk_wrong"):
            with connect(url, key) as client, pytest.raises(openai.AuthenticationError) as refused:
                client.chat.completions.create(model="echo", messages=HI)
            assert refused.value.code == "invalid_api_key"
        with connect(url, made_key(tmp_path)) as client:
            assert client.chat.completions.create(model="echo", messages=HI).choices[0].message.content
            with pytest.raises(openai.PermissionDeniedError, match="--admin"):
                client.get("/orchestrator/status", cast_to=object)


def made_key(home: Path) -> str:
    command = [sys.executable, "-m", "rbee.cli.main", "key", "create", "judge", "--quiet"]
    done = subprocess.run(
        command, env={"RBEE_HOME": str(home), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def own_address() -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: connecting a datagram socket only asks the routing table.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return None if address.startswith("127.") else address


def test_a_job_that_the_script_turns_away_is_a_rate_limit(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.mkdir()
    (config / "scheduler.rhai").write_text('fn should_admit(task, queue_depth) { reject("not today") }')
    with running_queen(home=tmp_path) as queen, connect(queen.url) as client:
        with pytest.raises(openai.RateLimitError, match="not today") as refused:
            client.chat.completions.create(model="echo", messages=HI)
        assert "retry-after" in refused.value.response.headers


def test_an_engine_that_breaks_is_a_server_error(own_queen: RunningQueen, start_echo: StartEcho) -> None:
    start_echo(fail="first")
    with connect(own_queen.url) as client, pytest.raises(openai.InternalServerError, match="fail=first"):
        client.chat.completions.create(model="echo", messages=HI)


def test_a_stream_that_breaks_raises_after_what_came(own_queen: RunningQueen, start_echo: StartEcho) -> None:
    start_echo(fail="middle")
    came: list[str] = []
    with connect(own_queen.url) as client:
        stream = client.chat.completions.create(model="echo", messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="fail=middle"):
            came.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "".join(came) == "one"


def test_nobody_listening_is_a_connection_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with connect(f"http://127.0.0.1:{port}") as client, pytest.raises(openai.APIConnectionError):
            client.models.list()
