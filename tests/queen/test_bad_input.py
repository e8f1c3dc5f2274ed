"""Bad input gets a clear answer: the right status, OpenAI's body, the field that is wrong, and what to do."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from attack_rig import own_address

from rbee.testing.programs import RunningQueen, running_queen

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


def post(queen: RunningQueen, path: str, body: bytes | dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    status, _, data = call(queen, "POST", path, body, **headers)
    return status, json.loads(data)


def call(
    queen: RunningQueen, method: str, path: str, body: bytes | dict[str, Any] = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def error_of(body: dict[str, Any]) -> dict[str, Any]:
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (CHAT, {"messages": HI}, "model", "you must provide"),
        (CHAT, {"model": "", "messages": HI}, "model", "length"),
        (CHAT, {"model": 7, "messages": HI}, "model", "str"),
        (CHAT, {"model": "echo"}, "messages", "you must provide"),
        (CHAT, {"model": "echo", "messages": []}, "messages", "length >= 1"),
        (CHAT, {"model": "echo", "messages": "hi"}, "messages", "array"),
        (CHAT, {"model": "echo", "messages": [{"role": "bard", "content": "hi"}]}, "messages[0].role", "bard"),
        (CHAT, {"model": "echo", "messages": [*HI, {"role": "user"}]}, "messages[1].content", "no content"),
        (CHAT, {"model": "echo", "messages": [{"content": "hi"}]}, "messages[0].role", "you must provide"),
        (CHAT, {"model": "echo", "messages": [{"role": "user", "content": [{"text": "x"}]}]}, None, "type"),
        (CHAT, {"model": "echo", "messages": HI, "temperature": 9}, "temperature", "2.0"),
        (CHAT, {"model": "echo", "messages": HI, "temperature": -0.1}, "temperature", "0"),
        (CHAT, {"model": "echo", "messages": HI, "temperature": "hot"}, "temperature", "float"),
        (CHAT, {"model": "echo", "messages": HI, "max_tokens": -1}, "max_tokens", ">= 1"),
        (CHAT, {"model": "echo", "messages": HI, "max_tokens": 2**63}, "max_tokens", ""),
        (CHAT, {"model": "echo", "messages": HI, "max_completion_tokens": 0}, "max_completion_tokens", ">= 1"),
        (CHAT, {"model": "echo", "messages": HI, "n": 0}, "n", ">= 1"),
        (CHAT, {"model": "echo", "messages": HI, "top_p": 1.5}, "top_p", "1.0"),
        (CHAT, {"model": "echo", "messages": HI, "stream": "yes"}, "stream", "bool"),
        (CHAT, {"model": "echo", "messages": HI, "stop": [1]}, None, "str"),
        (CHAT, {"model": "echo", "messages": HI, "n_discard": -1}, "n_discard", "null"),
        (CHAT, {"model": "echo", "messages": HI, "logit_bias": {"1": 1000}}, None, "100"),
        ("/v1/completions", {"model": "echo"}, "prompt", "you must provide"),
        ("/v1/completions", {"model": "echo", "prompt": ["a", 1]}, "prompt", "not both"),
        ("/v1/embeddings", {"model": "echo", "input": ""}, "input", "empty"),
        ("/v1/embeddings", {"model": "echo", "input": ["a"], "encoding_format": "hex"}, "encoding_format", "hex"),
        ("/v1/rerank", {"model": "echo", "query": "a", "documents": []}, "documents", "length"),
        (
            "/v1/responses",
            {"model": "echo", "input": "x", "previous_response_id": "r"},
            "previous_response_id",
            "input",
        ),
        ("/v1/messages", {"model": "echo", "messages": HI}, "max_tokens", "you must provide"),
    ],
)
def test_a_wrong_field_is_named(
    queen: RunningQueen, path: str, body: dict[str, Any], param: str | None, words: str
) -> None:
    status, answer = post(queen, path, body)
    error = error_of(answer)
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "echo", "messages": ' + b"[" * 100_000]
)
def test_json_that_is_none_is_refused(queen: RunningQueen, body: bytes) -> None:
    status, answer = post(queen, CHAT, body)
    assert status == 400
    assert error_of(answer)["type"] == "invalid_request_error"


def test_an_unknown_model_names_near_ones_and_what_is_installed(queen: RunningQueen) -> None:
    status, answer = post(queen, CHAT, {"model": "rbee-dmeo", "messages": HI})
    error = error_of(answer)
    assert status == 404
    assert error["code"] == "model_not_found"
    assert "Did you mean 'rbee-demo'?" in error["message"]
    assert "Installed: " in error["message"]
    assert "rbee model add" in error["message"]


def test_an_unknown_hive_is_named(queen: RunningQueen) -> None:
    status, answer = post(queen, CHAT, {"model": "echo", "messages": HI}, X_Rbee_Hive="nowhere")
    assert status == 404
    assert "nowhere" in error_of(answer)["message"]


def test_a_body_over_the_limit_is_413_and_the_queen_goes_on(queen: RunningQueen) -> None:
    huge = {"model": "echo", "messages": [{"role": "user", "content": "x" * (5 * 1024 * 1024)}]}
    status, answer = post(queen, CHAT, huge)
    assert status == 413
    assert "4194304" in error_of(answer)["message"]
    assert call(queen, "GET", "/health")[0] == 200


def test_an_endless_chunked_body_is_cut(queen: RunningQueen) -> None:
    parts = urlsplit(queen.url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60) as sock:
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        sent = 0
        try:
            while sent < 1024 * 1024 * 1024:
                sock.sendall(chunk)
                sent += 65536
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 1024 * 1024 * 1024, "the queen read a gigabyte"
    assert call(queen, "GET", "/health")[0] == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_a_wrong_method_says_which_are_right(queen: RunningQueen, method: str) -> None:
    status, headers, body = call(queen, method, CHAT)
    assert status == 405
    assert "POST" in headers["allow"]
    assert "POST" in error_of(json.loads(body))["message"]


def test_an_unknown_path_is_404_in_the_same_form(queen: RunningQueen) -> None:
    status, answer = post(queen, "/v1/nothing", {})
    assert status == 404
    assert error_of(answer)["code"] == "not_found"


def test_anthropic_routes_answer_errors_in_both_forms(queen: RunningQueen) -> None:
    status, answer = post(queen, "/v1/messages", {"model": "none", "max_tokens": 1, "messages": HI})
    assert status == 404
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nBad Header: x\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_malformed_http_is_400_and_closes(queen: RunningQueen, request_bytes: bytes) -> None:
    parts = urlsplit(queen.url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60) as sock:
        try:
            sock.sendall(request_bytes + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while data := sock.recv(65536):
                answer += data
        except ConnectionResetError:
            answer = b"HTTP/1.1 400 (reset)"
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"status":"ok"' not in answer, "the rest of a refused request was served"


def test_the_fleet_is_not_controlled_without_the_token(queen: RunningQueen) -> None:
    for method, path in [
        ("GET", "/v1/orchestrator/status"),
        ("POST", "/v1/orchestrator/shutdown"),
        ("POST", "/v1/orchestrator/hive-report"),
        ("GET", "/v1/hives"),
        ("POST", "/v1/hives/x/workers"),
        ("DELETE", "/v1/hives/x/workers/y"),
        ("POST", "/v1/hives/x/models"),
        ("DELETE", "/v1/hives/x/models/y"),
    ]:
        status, headers, body = call(queen, method, path, b"{}")
        assert status == 401, (method, path, body)
        assert headers["www-authenticate"].startswith("Bearer")


def test_a_prompt_longer_than_the_context_gives_both_numbers(queen: RunningQueen) -> None:
    words = "How do I add a machine? " * 4000
    status, answer = post(queen, CHAT, {"model": "rbee-demo", "messages": [{"role": "user", "content": words}]})
    error = error_of(answer)
    assert status == 400
    assert error["code"] == "context_length_exceeded"
    numbers = [int(word) for word in error["message"].replace(".", " ").split() if word.isdigit()]
    assert len(numbers) >= 2
    assert max(numbers) > min(numbers) >= 256


def test_a_port_in_use_is_said_in_one_line(queen: RunningQueen, tmp_path: Path) -> None:
    port = str(urlsplit(queen.url).port)
    done = subprocess.run(
        [sys.executable, "-m", "rbee.queen", "run", "--port", port],
        env={"RBEE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"Port {port}" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_key_is_needed_off_loopback() -> None:
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address but the loopback one")
    with running_queen("--host", "0.0.0.0", "--no-hive") as queen:
        port = urlsplit(queen.url).port
        for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer wrong"}, {"x-api-key": "wrong"}):
            connection = http.client.HTTPConnection(address, port, timeout=60)
            connection.request("GET", "/v1/models", headers=headers)
            answer = connection.getresponse()
            assert answer.status == 401
            assert error_of(json.loads(answer.read()))["code"] == "invalid_api_key"
            connection.close()
