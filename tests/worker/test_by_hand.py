"""A worker that a person starts: the command line, its mistakes, and who may use it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rbee.http.upstream import Upstream

RUN = [sys.executable, "-m", "rbee.worker", "run"]


@contextmanager
def started(*arguments: str) -> Iterator[tuple[str, list[str]]]:
    """Start a worker; yield its URL and its first lines."""
    process = subprocess.Popen([*RUN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if "ready after" in line:
                break
        port = re.search(r" listens on \S+:(\d+),", "".join(lines))
        assert port, lines
        yield f"http://127.0.0.1:{port[1]}", lines
    finally:
        process.terminate()
        process.communicate(timeout=60)


def models(url: str, *, token: str = "", origin: str = "") -> tuple[int, bytes]:
    upstream = Upstream(url, token=token)
    try:
        answer = upstream.request("GET", "/v1/models", headers={"Origin": origin} if origin else {})
        return answer.status, answer.read()
    finally:
        upstream.close()


def test_on_loopback_no_token_is_needed_but_browsers_are_refused() -> None:
    with started("--backend", "echo", "--port", "0") as (url, _):
        assert models(url)[0] == 200
        for origin in ("https://evil.example", "null"):
            assert models(url, origin=origin)[0] == 403
        assert models(url, origin="http://localhost:3000")[0] == 200


def test_a_name_that_was_rebound_to_this_machine_is_refused() -> None:
    with (
        started("--backend", "echo", "--port", "0") as (url, _),
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as connection,
    ):
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 403 ")


def test_off_loopback_a_token_is_made_and_shown_once() -> None:
    with started("--backend", "echo", "--host", "0.0.0.0", "--port", "0") as (url, lines):
        tokens = set(re.findall(r"rbee_worker_\S+", "".join(lines)))
        assert len(tokens) == 1
        assert models(url)[0] == 401
        assert models(url, token=tokens.pop())[0] == 200


def test_a_token_file_is_honoured(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret-of-mine\n")
    with started("--backend", "echo", "--port", "0", "--token-file", str(file)) as (url, lines):
        assert "secret-of-mine" not in "".join(lines)
        assert models(url)[0] == 401
        assert models(url, token="secret-of-mine")[0] == 200


def test_the_built_in_model_needs_no_path() -> None:
    with started("--model", "rbee-demo", "--port", "0", "--ctx", "256", "--name", "mine") as (url, _):
        assert b'"id":"mine"' in models(url)[1]


@pytest.mark.parametrize("arguments", [["--backend", "echo"], ["--model", "rbee-demo"]], ids=str)
def test_ctrl_c_ends_it_cleanly(arguments: list[str]) -> None:
    command = [*RUN, *arguments, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "ready after" in line:
                os.killpg(process.pid, signal.SIGINT)  # a terminal tells the whole group
        assert process.wait(60) == 0
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "/nowhere/x.gguf"], "no model file /nowhere/x.gguf"),
        (["--model", "llama-99"], "rbee-demo"),
        (["--backend", "nothing"], "No backend is called 'nothing'"),
        (["--backend", "echo", "--option", "delay"], "KEY=VALUE"),
        (["--backend", "echo", "--gpu", "one"], "--gpu"),
        (["--backend", "echo", "--port", "99999"], "65535"),
        (["--backend", "echo", "--host", "203.0.113.7", "--port", "0", "--token-file", "/nowhere"], "/nowhere"),
        (["--backend", "echo", "--host", "203.0.113.7", "--port", "0"], "Cannot listen on 203.0.113.7"),
        (["--spec", "/nowhere/spec.json"], "/nowhere/spec.json"),
        (["--spec", __file__], "no worker spec"),
    ],
    ids=str,
)
def test_a_mistake_on_the_command_line_is_one_clear_line(arguments: list[str], says: str) -> None:
    ended = subprocess.run([*RUN, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode not in (0, -6, -11)
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
