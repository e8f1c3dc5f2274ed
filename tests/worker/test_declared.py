"""A worker as systemd runs it: settings, credentials, a passed socket, TLS, and what it tells systemd."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fleet_certificates import Authority, make_authority

from rbee.client import Client
from rbee.errors import AccessDenied, RbeeError, Unreachable
from rbee.http.upstream import Upstream
from rbee.testing.programs import until
from rbee.wire.fleet import WorkerHealth
from rbee.wire.settings import Tls, WorkerSettings, dump_settings

TOKEN = "the-worker-token"
CREDENTIALS = Tls(certificate="host.crt", key="host.key", authority="ca.crt")
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
    "os.execv(sys.executable, [sys.executable, '-m', 'rbee.worker', 'run', '--settings', sys.argv[2]])"
)
"""Does what systemd does with a socket unit: descriptor 3, announced to this process number (sd_listen_fds(3))."""


class Systemd:
    """Where a service's notifications arrive (sd_notify(3))."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.said: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while data := self._socket.recv(65536):
            self.said += data.decode().split("\n")

    def heard(self, start: str) -> list[str]:
        return [line for line in self.said if line.startswith(start)]

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@dataclass
class Declared:
    """A worker process that was started from a settings file."""

    process: subprocess.Popen[str]
    systemd: Systemd
    port: int
    runtime: Path
    tls: ssl.SSLContext | None
    output: list[str] = field(default_factory=list)

    def client(self, token: str = TOKEN, tls: ssl.SSLContext | None = None) -> Client:
        scheme = "https" if self.tls else "http"
        return Client(f"{scheme}://127.0.0.1:{self.port}", token=token, tls=tls or self.tls, timeout_s=60)

    def ready(self) -> None:
        until(lambda: self.systemd.heard("READY=1") or self.process.poll() is not None, "the worker to be ready")
        assert self.process.poll() is None, self.output

    def wait(self) -> int:
        code = self.process.wait(60)
        until(lambda: self.output and self.output[-1] == "", "the end of the output")
        return code


StartDeclared = Callable[..., Declared]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return make_authority(tmp_path / "authority")


@pytest.fixture
def start(tmp_path: Path, authority: Authority) -> Iterator[StartDeclared]:
    """Start workers from settings files with a socket passed in; each is ended."""
    started: list[Declared] = []

    def begin(
        *, tls: bool = False, abstract: bool = False, watchdog_s: float = 0, pass_socket: bool = True, **fields: Any
    ) -> Declared:
        folder = tmp_path / f"w{len(started)}"
        runtime, secrets = folder / "run", authority.host(folder / "credentials")
        runtime.mkdir()
        (secrets / "token").write_text(TOKEN + "\n")
        systemd = Systemd(f"@rbee-{os.getpid()}-{id(folder)}" if abstract else str(folder / "n.sock"))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            whole = {"name": "tiny", "model": "rbee-demo", "tls": CREDENTIALS if tls else None, **fields}
            if not pass_socket:
                whole.setdefault("host", "127.0.0.1")
            file = folder / "tiny.yaml"
            file.write_text(dump_settings(WorkerSettings(port=port if not pass_socket else 1, **whole)))
            environment = {
                **os.environ,
                "NOTIFY_SOCKET": systemd.address,
                "CREDENTIALS_DIRECTORY": str(secrets),
                "RUNTIME_DIRECTORY": str(runtime),
                "HOME": "/nonexistent",
                **({"WATCHDOG_USEC": str(round(watchdog_s * 1e6))} if watchdog_s else {}),
                **({"LISTEN_FDS": "1"} if pass_socket else {}),
            }
            environment.pop("RBEE_HOME", None)
            plain = [sys.executable, "-m", "rbee.worker", "run", "--settings", str(file)]
            passing = [sys.executable, "-c", START, str(listener.fileno()), str(file)]
            if not pass_socket:
                listener.close()
            process = subprocess.Popen(
                passing if pass_socket else plain,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                pass_fds=[listener.fileno()] if pass_socket else [],
            )
        worker = Declared(process, systemd, port, runtime, authority.trusted if tls else None)
        threading.Thread(target=_read, args=(worker,), daemon=True).start()
        started.append(worker)
        return worker

    yield begin
    for worker in started:
        worker.process.terminate()
        try:
            worker.process.wait(60)
        finally:
            worker.process.kill()
            worker.systemd.close()


def _read(worker: Declared) -> None:
    assert worker.process.stdout
    with worker.process.stdout as lines:
        worker.output += [line.rstrip() for line in lines]
    worker.output.append("")


def ask(client: Client, **more: object) -> dict[str, Any]:
    body = {"model": "rbee-demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **more}
    return client.post("/v1/chat/completions", body, dict)


@pytest.mark.parametrize("abstract", [False, True])
def test_it_tells_systemd_of_its_whole_life(start: StartDeclared, abstract: bool) -> None:
    worker = start(abstract=abstract)
    worker.ready()
    assert worker.systemd.heard("STATUS=")[0] == "STATUS=loading rbee-demo, 0%"
    assert "STATUS=ready, rbee-demo with xllamacpp" in worker.systemd.said
    client = worker.client()
    assert ask(client)["usage"]["completion_tokens"] == 4
    client.close()
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert worker.systemd.heard("STOPPING=1")
    assert worker.systemd.heard("READY=1") == ["READY=1"]


def test_it_serves_on_the_socket_that_it_was_passed_and_leaves_it_to_no_child(start: StartDeclared) -> None:
    worker = start()
    worker.ready()
    client = worker.client()
    assert client.get("/health", WorkerHealth).name == "tiny"
    client.close()
    assert (worker.runtime / "engine.sock").exists()
    assert worker.runtime.stat().st_mode & 0o077 == 0
    for pid in Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"NOTIFY_SOCKET" not in environment
        assert b"LISTEN_FDS" not in environment


def test_without_a_passed_socket_it_opens_its_own(start: StartDeclared) -> None:
    worker = start(pass_socket=False)
    worker.ready()
    client = worker.client()
    assert client.get("/health", WorkerHealth).status == "ready"
    client.close()


def test_health_needs_no_token_but_a_wrong_one_is_refused(start: StartDeclared) -> None:
    worker = start()
    worker.ready()
    for token in ("", TOKEN):
        client = worker.client(token=token)
        health = client.get("/health", WorkerHealth)
        assert (health.status, health.backend) == ("ready", "xllamacpp")
        assert "chat" in health.capabilities
        assert health.memory_bytes > 10_000_000
        client.close()
    wrong = worker.client(token="another")
    with pytest.raises(RbeeError, match="token") as refusal:
        wrong.get("/health", WorkerHealth)
    assert refusal.value.status == AccessDenied.status
    wrong.close()


def test_tls_takes_the_fleets_authority_and_the_token(
    start: StartDeclared, authority: Authority, tmp_path: Path
) -> None:
    worker = start(tls=True)
    worker.ready()
    client = worker.client()
    assert ask(client)["usage"]["completion_tokens"] == 4
    client.close()
    stranger = worker.client(tls=make_authority(tmp_path / "stranger").trusted)
    with pytest.raises(Unreachable, match="certificate is refused"):
        ask(stranger)
    plain = Client(f"http://127.0.0.1:{worker.port}", token=TOKEN)
    with pytest.raises(RbeeError):
        ask(plain)
    with socket.create_connection(("127.0.0.1", worker.port)) as raw:
        old = authority.trusted
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ssl.SSLError):
            old.wrap_socket(raw, server_hostname="127.0.0.1")


@pytest.mark.parametrize("polite", [True, False])
def test_a_tls_client_that_leaves_frees_the_engines_slot(start: StartDeclared, slow_spec: Any, polite: bool) -> None:
    worker = start(tls=True, model="slow", path=slow_spec.path)
    worker.ready()
    assert worker.tls
    body = json.dumps({"model": "slow", "prompt": "hi", "max_tokens": 4000}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n"
    )
    raw = socket.create_connection(("127.0.0.1", worker.port), timeout=60)
    secured = worker.tls.wrap_socket(raw, server_hostname="127.0.0.1")
    secured.sendall(head.encode() + b"\r\n" + body)
    client = worker.client()
    until(lambda: client.get("/health", WorkerHealth).in_flight == 1, "the job to begin")
    if polite:
        secured.settimeout(0)
        with pytest.raises(ssl.SSLWantReadError):
            secured.unwrap()
    secured.close()
    until(lambda: client.get("/health", WorkerHealth).in_flight == 0, "the slot to be free")
    client.close()


def test_a_silent_tls_client_does_not_hold_up_others(start: StartDeclared) -> None:
    worker = start(tls=True)
    worker.ready()
    silent = [socket.create_connection(("127.0.0.1", worker.port)) for _ in range(20)]
    client = worker.client()
    assert client.get("/health", WorkerHealth).status == "ready"
    client.close()
    for one in silent:
        one.close()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"path": "/nowhere/model.gguf"}, "/nowhere/model.gguf: there is no such file"),
        ({"path": __file__}, "no model file"),
        ({"backend": "nothing"}, "No backend is called 'nothing'"),
        ({"model": "unheard-of"}, "No engine that can run here is called 'unheard-of'"),
        ({"backend": "xllamacpp", "options": {"kv": "much"}}, "separate, shared"),
        ({"token_file": "absent"}, "of this worker cannot be read"),
    ],
    ids=str,
)
def test_what_cannot_start_says_why_in_one_line_and_to_systemd(
    start: StartDeclared, fields: dict[str, Any], reason: str
) -> None:
    worker = start(**fields)
    assert worker.wait() == 1
    assert reason in worker.output[-2]
    assert "Traceback" not in "\n".join(worker.output)
    (told,) = worker.systemd.heard("STATUS=failed: ")
    assert reason in told
    assert worker.systemd.heard("ERRNO=")
    assert not worker.systemd.heard("READY=1")


def test_settings_that_are_damaged_name_their_file(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    for text in ("name: [", "name: tiny\nmodel: x\nport: 70000\n", "colour: red\n"):
        file.write_text(text)
        command = [sys.executable, "-m", "rbee.worker", "run", "--settings", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert str(file) in done.stderr
        assert "Traceback" not in done.stderr


def test_a_worker_of_an_engine_without_files_runs_by_the_engines_name(start: StartDeclared) -> None:
    worker = start(model="echo", context_tokens=512)
    worker.ready()
    client = worker.client()
    assert client.get("/health", WorkerHealth).backend == "echo"
    client.close()


def test_tls_upstream_keeps_its_connection(start: StartDeclared) -> None:
    worker = start(tls=True)
    worker.ready()
    upstream = Upstream(f"https://127.0.0.1:{worker.port}", token=TOKEN, tls=worker.tls)
    first = upstream.request("GET", "/health")
    port = first._sock.getsockname()
    first.read()
    second = upstream.request("GET", "/health")
    assert second._sock.getsockname() == port
    second.read()
    assert not upstream.lost_idle()
    worker.process.send_signal(signal.SIGTERM)
    until(upstream.lost_idle, "the end of the worker to be seen")
    upstream.close()
