"""The queen ends and starts again under load: what runs ends well or says why not, who comes meanwhile is served."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from queen_rig import FleetFolder

from rbee.queen.connections import NEW_S
from rbee.testing.openai_server import running_server
from rbee.testing.programs import RunningQueen, running_queen, until

CHAT = "/v1/chat/completions"
STREAMS = 20
LONG = 4000
RATE = 50
CLIENTS = 5
PASS = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.executable, sys.argv[2:])
"""
"""Passes a socket on as systemd does (sd_listen_fds(3)): as descriptor 3 of the process that it names."""


def chat(text: str = "one two three", **fields: Any) -> bytes:
    return json.dumps({"model": "honey", "messages": [{"role": "user", "content": text}], **fields}).encode()


def servers(fleet: FleetFolder, *urls: str) -> None:
    lines = [f"Worker s{number} model=honey slots=64 url={url}" for number, url in enumerate(urls)]
    fleet.write(desk=["HivePort none", *lines])


class Stream:
    """A stream that is read to its end in a thread of its own."""

    def __init__(self, address: str, words: int) -> None:
        self.body = b""
        self._connection = http.client.HTTPConnection(address, timeout=120)
        self._connection.request("POST", CHAT, chat("word " * words, stream=True))
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.closing(self._connection):
            while data := self._answer.read1():
                self.body += data

    def end(self) -> str:
        """Return how it ended: `done`, or the code of the error in its last event."""
        self._thread.join(120)
        if self.body.endswith(b"data: [DONE]\n\n"):
            return "done"
        last = self.body.strip().rpartition(b"\n")[2]
        return str(json.loads(last.removeprefix(b"data: "))["error"]["code"])


class Load:
    """Clients that together ask so many times a second, each on a connection that it keeps while the queen does."""

    def __init__(self, address: str) -> None:
        self.answered = 0
        self.failed: list[str] = []
        self._address = address
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *told: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(120)

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=120)
        with contextlib.closing(connection):
            while not self._end.wait(CLIENTS / RATE):
                try:
                    connection.request("POST", CHAT, chat())
                    answer = connection.getresponse()
                    body = answer.read()
                except (OSError, http.client.HTTPException) as problem:
                    self.failed.append(repr(problem))
                    connection.close()
                    continue
                if answer.status == 200 and b"one two three" in body:
                    self.answered += 1
                else:
                    self.failed.append(f"{answer.status} {body!r}")


@contextlib.contextmanager
def queen_on(
    listener: socket.socket, fleet: FleetFolder, home: Path, *, port: int = 0, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a queen that is passed a socket that listens already, as systemd starts her again when it has kept it.

    She is to listen at its port, or at another `port`.
    """
    port = port or listener.getsockname()[1]
    words = [sys.executable, "-m", "rbee.queen", "run", "--no-hive", "--port", port, "--inventory", fleet.folder]
    command = [sys.executable, "-c", PASS, str(listener.fileno()), *map(str, words)]
    environment = {**os.environ, "RBEE_HOME": str(home), **variables}
    process = subprocess.Popen(command, env=environment, pass_fds=[listener.fileno()], cwd=home)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_a_restart_under_load_fails_no_request_where_the_socket_is_kept(fleet: FleetFolder, tmp_path: Path) -> None:
    with running_server(word_s=0.01) as server, socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        servers(fleet, server.url)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with contextlib.ExitStack() as stack:
            with queen_on(listener, fleet, tmp_path) as queen, Load(address) as first:
                until(lambda: first.answered > RATE, "jobs to be answered")
            assert queen.returncode == 0
            assert not first.failed
            load = stack.enter_context(Load(address))
            for _ in range(2):
                with queen_on(listener, fleet, tmp_path) as queen:
                    before = load.answered
                    until(lambda before=before: load.answered > before + RATE, "jobs to be answered")  # type: ignore[misc]
                    streams = [Stream(address, 50) for _ in range(STREAMS)]
                # It has ended, with the load on; the next one takes what waits in the kernel.
                assert queen.returncode == 0
                assert [stream.end() for stream in streams] == ["done"] * STREAMS
            with queen_on(listener, fleet, tmp_path):
                before = load.answered
                until(lambda: load.answered > before + RATE, "jobs to be answered")
                stack.close()
        assert not load.failed


def test_she_has_systemd_keep_her_socket_and_leaves_one_of_another_address(fleet: FleetFolder, tmp_path: Path) -> None:
    servers(fleet)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
        socket.create_server(("127.0.0.2", 0)) as other,
        socket.create_server(("127.0.0.1", 0)) as free,
    ):
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        port = free.getsockname()[1]
        free.close()
        with queen_on(other, fleet, tmp_path, port=port, NOTIFY_SOCKET=str(tmp_path / "notify")):
            assert systemd.recv(1000) == b"FDSTOREREMOVE=1\nFDNAME=http"
            message, [kept], _, _ = socket.recv_fds(systemd, 1000, 1)
            assert message == b"FDSTORE=1\nFDNAME=http"
            with socket.socket(fileno=kept) as listener:
                assert listener.getsockname() == ("127.0.0.1", port)
                assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            until(lambda: b"READY=1" in systemd.recv(1000), "her to serve")
            assert health(f"127.0.0.1:{port}") == 200


def test_whoever_comes_while_streams_run_on_is_served(fleet: FleetFolder) -> None:
    """Also without a kept socket: a queen that is to end takes requests for as long as she has to stay anyway."""
    with running_server(word_s=0.01) as server:
        servers(fleet, server.url)
        with running_queen("--no-hive", "--inventory", str(fleet.folder)) as queen:
            address = urlsplit(queen.url).netloc
            until(lambda: answers(queen), "the server to be known")
            with contextlib.closing(http.client.HTTPConnection(address, timeout=60)) as kept:
                kept.request("POST", CHAT, chat())
                assert kept.getresponse().read()
                short = [Stream(address, 300) for _ in range(STREAMS - 1)]
                long = Stream(address, LONG)
                queen.process.send_signal(signal.SIGTERM)
                until(lambda: health(address) == 503, "the queen to tell that she is to end")
                kept.request("POST", CHAT, chat())
                last = kept.getresponse()
                assert (last.status, last.getheader("Connection")) == (200, "close")
                assert b"one two three" in last.read()
                came = Stream(address, 10)
            assert [stream.end() for stream in short] == ["done"] * (STREAMS - 1)
            assert came.end() == "done"
            assert long.end() == "shutting_down"
            assert queen.process.wait(60) == 0


def test_a_whole_answer_that_would_outlast_the_end_is_refused_in_words(fleet: FleetFolder) -> None:
    with running_server() as server:
        server.behave(answer="hang")
        servers(fleet, server.url)
        with running_queen("--ephemeral", "--no-hive", "--inventory", str(fleet.folder)) as queen:
            until(lambda: b'"ready"' in queen.client.send("GET", "/v1/orchestrator/status").read(), "the server")
            connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=120)
            with contextlib.closing(connection):
                connection.request("POST", CHAT, chat())
                until(lambda: server.told().in_flight == 1, "the job to reach the server")
                queen.process.send_signal(signal.SIGTERM)
                answer = connection.getresponse()
                assert answer.status == 503
                assert json.loads(answer.read())["error"]["code"] == "shutting_down"
                assert answer.getheader("Retry-After")
            until(lambda: server.told().in_flight == 0, "the server to be free")


def test_a_connection_that_has_just_come_is_not_closed_before_its_request(fleet: FleetFolder) -> None:
    with running_server(word_s=0.01) as server:
        servers(fleet, server.url)
        with running_queen("--no-hive", "--inventory", str(fleet.folder)) as queen:
            parts = urlsplit(queen.url)
            until(lambda: answers(queen), "the server to be known")
            stream = Stream(parts.netloc, 200)
            queen.process.send_signal(signal.SIGTERM)
            until(lambda: health(parts.netloc) == 503, "the queen to tell that she is to end")
            with socket.create_connection((parts.hostname, parts.port), timeout=60) as sock:
                time.sleep(NEW_S / 2)  # it is the client that hesitates
                body = chat()
                sock.sendall(
                    f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
                )
                assert sock.recv(65536)[:12] == b"HTTP/1.1 200"
            assert stream.end() == "done"


def health(address: str) -> int:
    connection = http.client.HTTPConnection(address, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/health")
        return connection.getresponse().status


def answers(queen: RunningQueen) -> bool:
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", CHAT, chat())
        return connection.getresponse().status == 200
