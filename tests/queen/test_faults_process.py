"""Faults of the queen's own process: an event loop that is blocked, a clock that jumps, connections without end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from queen_rig import FleetFolder, until_state

from rbee.errors import RbeeError
from rbee.queen.keys import INFERENCE, KeyStore
from rbee.queen.policy import Policy
from rbee.testing.openai_server import running_server
from rbee.testing.programs import RunningQueen, processes_of, running_queen, until

CHAT = "/v1/chat/completions"
CONNECTIONS = 2000


def chat(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": "honey", "messages": [{"role": "user", "content": text}], **fields}


def answers(queen: RunningQueen) -> bool:
    try:
        return "one two three" in str(queen.client.post(CHAT, chat(), dict[str, Any]))
    except RbeeError:
        return False


def serving(queen: RunningQueen) -> int:
    """Return the id of the server process."""
    [pid] = [pid for pid, line in processes_of(queen.home) if "rbee.queen" in line and pid != queen.record.pid]
    return pid


BLOCKED = """
import gevent.monkey
gevent.monkey.patch_all()
import gevent, logging, sys
from gevent.monkey import get_original
from prometheus_client import CollectorRegistry, generate_latest
from rbee.queen.loop_guard import LoopGuard

logging.basicConfig(stream=sys.stdout, format="%(message)s")
guard = LoopGuard(blocked_s=0.5)
registry = CollectorRegistry()
registry.register(guard)
guard.start()

def somebody_who_blocks():
    get_original("time", "sleep")(1.5)

gevent.spawn(somebody_who_blocks).join()
for _ in range(20):
    gevent.sleep(0.05)
gevent.spawn(somebody_who_blocks).join()
gevent.sleep(0.1)
guard.stop()
print(generate_latest(registry).decode())
"""


def test_a_blocked_event_loop_is_told_of_with_its_stack_and_counted() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120, check=True)
    told = [line for line in done.stdout.splitlines() if "has stood still for" in line]
    assert len(told) >= 2
    assert done.stdout.count("in somebody_who_blocks") >= 2
    [count] = [line for line in done.stdout.splitlines() if line.startswith("rbee_event_loop_blocked_total ")]
    assert float(count.split()[1]) >= 2
    assert not done.stderr


def test_a_server_process_that_stands_is_replaced(fleet: FleetFolder) -> None:
    """It takes gunicorn's 30 s; the master, the port and the clients that wait stay."""
    with running_server() as server:
        fleet.write(desk=["HivePort none", f"Worker s model=honey url={server.url}"])
        with running_queen("--no-hive", "--inventory", str(fleet.folder)) as queen:
            until_state(queen, "desk", "ready")
            stands = serving(queen)
            queen.client.close()
            os.kill(stands, signal.SIGSTOP)
            until(lambda: stands not in [pid for pid, _ in processes_of(queen.home)], "it to be killed", 120)
            until(lambda: answers(queen), "another one to serve")
            assert serving(queen) != stands
            assert queen.process.poll() is None


JUMP = """
import os, time
_real, _file = time.time, os.environ.get("TEST_CLOCK", "")
def _jumped():
    try:
        return _real() + os.stat(_file).st_mtime - 1_000_000
    except OSError:
        return _real()
if _file:
    time.time = _jumped
    time.time_ns = lambda: int(_jumped() * 1e9)
"""


class Clock:
    """The wall clock of a queen: a file, whose time of change says by how much she is off."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "clock"
        self.file.touch()
        self.jump(0)
        (folder / "sitecustomize.py").write_text(JUMP)
        self.environment = {"PYTHONPATH": str(folder), "TEST_CLOCK": str(self.file)}

    def jump(self, seconds: float) -> None:
        os.utime(self.file, (1_000_000 + seconds,) * 2)


def test_a_clock_that_jumps_ends_nothing_and_gives_nobody_more(fleet: FleetFolder, tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    with running_server(word_s=0.02) as server:
        fleet.write(desk=["HivePort none", f"Worker s model=honey url={server.url}"])
        options = ["--no-hive", "--inventory", str(fleet.folder)]
        with running_queen(*options, home=tmp_path, env=clock.environment) as queen:
            until_state(queen, "desk", "ready")
            policy = Policy(requests_per_minute=3)
            secret = KeyStore(tmp_path / "state" / "keys.sqlite").create(
                "k", scopes=frozenset({INFERENCE}), policy=policy
            )[1]
            for _ in range(3):
                assert ask(queen, chat(), Authorization=f"Bearer {secret}")[0] == 200
            body: list[bytes] = []
            stream = threading.Thread(target=lambda: body.append(ask(queen, chat("word " * 400, stream=True))[1]))
            stream.start()
            jumps = (3600, -3600, 0, 1, -1, 86_400 * 40, 0)
            for jump in jumps:
                clock.jump(jump)
                job = queen.client.post("/v1/jobs", {"endpoint": CHAT, "body": chat()}, dict[str, Any])["job_id"]
                assert ask(queen, chat(), X_Request_Timeout="60")[0] == 200
                assert ask(queen, chat(), Authorization=f"Bearer {secret}")[0] == 429
                until(lambda job=job: status(queen, job) == "completed", "the job to be run")  # type: ignore[misc]
            assert stream.is_alive()
            stream.join(120)
            assert body[0].count(b'"word ') == 400
            assert body[0].endswith(b"data: [DONE]\n\n")
            assert [shown.state for shown in queen.status().hives] == ["ready"]


def status(queen: RunningQueen, job: str) -> str:
    return str(queen.client.get(f"/v1/jobs/{job}", dict[str, Any])["status"])


def ask(queen: RunningQueen, body: dict[str, Any], **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=120)
    with contextlib.closing(connection):
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", CHAT, json.dumps(body), told)
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.fixture
def many_descriptors() -> Any:
    """Let this process open as many files as the test needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < CONNECTIONS + 500:
        pytest.skip(f"this process may open only {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, CONNECTIONS + 500), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_two_thousand_connections_are_all_served(fleet: FleetFolder) -> None:
    with running_server() as server, contextlib.ExitStack() as stack:
        fleet.write(desk=["HivePort none", f"Worker s model=honey slots=64 url={server.url}"])
        with running_queen("--no-hive", "--inventory", str(fleet.folder)) as queen:
            until_state(queen, "desk", "ready")
            parts = urlsplit(queen.url)
            request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
            open_before = len(os.listdir(f"/proc/{serving(queen)}/fd"))
            with contextlib.ExitStack() as clients:
                many = [
                    clients.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=120))
                    for _ in range(CONNECTIONS)
                ]
                assert answers(queen)
                # Every one of them is there still, and is served.
                for sock in many:
                    sock.sendall(request)
                assert {sock.recv(65536)[:12] for sock in many} == {b"HTTP/1.1 200"}
                assert answers(queen)
            until(
                lambda: len(os.listdir(f"/proc/{serving(queen)}/fd")) < open_before + CONNECTIONS / 20,
                "the descriptors to be given back",
            )
            assert not [line for line in queen.log if "Traceback" in line]
            stack.close()
