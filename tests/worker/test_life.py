"""A worker's life: loading, ready, draining, failed; its hive, its parent, its signals."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from rbee.errors import RbeeError
from rbee.testing import FakeHive, RunningWorker, run_worker, started_worker
from rbee.testing.programs import until
from rbee.wire.fleet import WorkerSpec, WorkerState

SYS_TGKILL = {"x86_64": 234, "aarch64": 131}.get(platform.machine(), 0)


def echo_spec(**more: object) -> WorkerSpec:
    options: dict[str, str] = more.pop("options", {})  # type: ignore[assignment]
    return WorkerSpec(name="echo", backend="echo", model="echo", options=options, **more)  # type: ignore[arg-type]


def alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a connection's thread may end meanwhile
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def test_a_ready_worker_tells_its_hive_with_its_own_token(demo_spec: WorkerSpec) -> None:
    with FakeHive() as hive:
        spec = msgspec.structs.replace(demo_spec, hive_url=hive.url, token="the-token", slots=2, context_tokens=512)
        with run_worker(spec) as worker:
            ready = hive.ready()[0]
            assert (ready.name, ready.pid, ready.state) == ("demo", worker.process.pid, WorkerState.READY)
            assert worker.url.endswith(f":{ready.port}")
            assert (ready.slots, ready.context_tokens) == (2, 512)
            assert {"chat", "completion"} <= set(ready.capabilities)
            assert {"responses", "messages", "tools", "json_schema", "logprobs"} == set(ready.features)
            assert ready.engine_url.startswith("unix:/")
            assert hive.calls[0].token == "the-token"


def test_a_hive_that_comes_late_is_told_all_the_same() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with run_worker(echo_spec(hive_url=f"http://127.0.0.1:{port}")) as worker:
        from rbee.http.server import Routes, Server, reply

        told: list[bytes] = []
        routes = Routes()
        routes.add("POST", "/v1/workers/ready", lambda request: told.append(request.body) or reply({}))  # type: ignore[func-returns-value]
        server = Server("127.0.0.1", port, routes)
        server.start()
        until(lambda: told, "the announcement to the late hive")
        server.shutdown()
        server.server_close()
        assert worker.health().status == "ready"


def test_a_failed_load_is_one_line_an_exit_code_and_news_to_the_hive() -> None:
    with FakeHive() as hive, started_worker(echo_spec(hive_url=hive.url, options={"fail": "load"})) as worker:
        assert worker.wait() == 1
        assert "fail=load" in worker.log.splitlines()[-1]
        assert "Traceback" not in worker.log
        failed = hive.ready()[-1]
        assert failed.state == WorkerState.FAILED
        assert "fail=load" in failed.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"path": "/nowhere/model.gguf"}, "/nowhere/model.gguf: there is no such file"),
        ({"path": __file__}, "no model file"),
        ({"path": ""}, "needs a model file"),
        ({"backend": "nothing"}, "No backend is called 'nothing'"),
        ({"options": {"speed": "9"}}, "has no option speed"),
        ({"options": {"kv": "much"}}, "separate, shared"),
        ({"options": {"lora": "/nowhere"}}, "lora"),
        ({"device": "abacus"}, "cannot use abacus"),
        ({"device": "cuda"}, "no cuda support"),
    ],
    ids=str,
)
def test_what_cannot_load_says_why(demo_spec: WorkerSpec, change: dict[str, object], reason: str) -> None:
    with FakeHive() as hive:
        spec = msgspec.structs.replace(demo_spec, hive_url=hive.url, **change)
        with started_worker(spec) as worker:
            assert worker.wait() == 1
            assert reason in worker.log.splitlines()[-1]
            assert "Traceback" not in worker.log
            assert reason in hive.ready()[-1].reason


def test_a_truncated_model_is_refused_before_the_engine_sees_it(demo_spec: WorkerSpec, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(Path(demo_spec.path).read_bytes()[:-1000])
    with started_worker(msgspec.structs.replace(demo_spec, path=str(short))) as worker:
        assert worker.wait() == 1
        assert "1000 bytes past the end of the file" in worker.log
        assert "engine ended" not in worker.log


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with FakeHive() as hive, started_worker(echo_spec(port=port, hive_url=hive.url)) as worker:
            assert worker.wait() == 1
            assert f"Port {port}" in worker.log
            assert f"Port {port}" in hive.ready()[-1].reason


def test_health_answers_while_the_model_loads(slow_plugin: dict[str, str]) -> None:
    spec = WorkerSpec(name="slow", backend="slow", model="slow")
    with started_worker(spec, env=slow_plugin) as worker:
        assert worker.health().status == "loading"
        answer = worker.send("/health", b"", method="GET")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        answer.close()
        with pytest.raises(RbeeError, match="loading") as busy:
            worker.chat("hi")
        assert busy.value.status == 503
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0


def test_sigterm_lets_answers_finish_and_takes_no_new_ones() -> None:
    with run_worker(echo_spec(options={"delay_ms": "400"})) as worker:
        stream = worker.stream("/v1/chat/completions", {"model": "echo", "messages": [user("a b c d e f g h i j")]})
        next(stream)
        worker.signal(signal.SIGTERM)
        until(lambda: worker.health().status == "draining", "the drain to begin")
        with pytest.raises(RbeeError, match="shutting down"):
            worker.chat("hi")
        assert [*stream][-1] == {"done": "[DONE]"}
        assert worker.wait() == 0


@pytest.mark.parametrize("backend", ["echo", "xllamacpp"])
def test_answers_that_outlast_the_drain_end_with_an_error(backend: str, demo_spec: WorkerSpec) -> None:
    spec = echo_spec(options={"delay_ms": "1000"})
    body: dict[str, object] = {"model": "echo", "messages": [user("word " * 100)]}
    if backend == "xllamacpp":
        spec = demo_spec  # its answers are too fast to outlast a drain, so the engine is stopped
        body = {"model": "rbee-demo", "messages": [user("hi")], "ignore_eos": True, "max_tokens": 1900}
    with run_worker(spec) as worker:
        stream = worker.stream("/v1/chat/completions", body)
        next(stream)
        if backend == "xllamacpp":
            os.kill(engine(worker), signal.SIGSTOP)
        worker.signal(signal.SIGTERM)
        last = [*stream][-1]
        assert last["error"]["code"] == "worker_lost"
        assert worker.wait() == 0
        assert "Traceback" not in worker.log


def test_a_second_signal_ends_answers_at_once() -> None:
    words = 400
    with run_worker(echo_spec(options={"delay_ms": "100"})) as worker:
        stream = worker.stream("/v1/chat/completions", {"model": "echo", "messages": [user("word " * words)]})
        next(stream)
        worker.signal(signal.SIGTERM)
        until(lambda: worker.health().status == "draining", "the drain to begin")
        worker.signal(signal.SIGTERM)
        events = [*stream]
        assert events[-1]["error"]["code"] == "worker_lost"
        # A drain alone would have let about a hundred of them pass.
        assert len(events) < 50
        assert worker.wait() == 0


@pytest.mark.skipif(not SYS_TGKILL, reason="tgkill(2) has another number on this machine")
def test_a_signal_that_reaches_another_thread_ends_the_worker_too() -> None:
    """The kernel may choose any thread; a main thread that sleeps in a system call is not woken by it."""
    with run_worker(echo_spec()) as worker:
        pid = worker.process.pid
        threads = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir() if int(task.name) != pid]
        ctypes.CDLL(None).syscall(SYS_TGKILL, pid, threads[0], signal.SIGTERM)
        assert worker.wait() == 0


def test_a_drain_by_request_keeps_the_process() -> None:
    with run_worker(echo_spec()) as worker:
        assert worker.post("/v1/worker/drain", {})["status"] == "draining"
        with pytest.raises(RbeeError, match="shutting down"):
            worker.chat("hi")
        assert worker.process.poll() is None


def test_a_worker_and_its_engine_die_with_their_parent(demo_spec: WorkerSpec, tmp_path: Path) -> None:
    """`kill -9` of whoever started a worker leaves no orphan."""
    spec = msgspec.structs.replace(demo_spec, token="t")
    code = (
        "import os, subprocess, sys, msgspec, pathlib, time\n"
        "spec = msgspec.json.decode(sys.argv[1].encode()) | {'parent_pid': os.getpid()}\n"
        "file = pathlib.Path(sys.argv[2]) / 'spec.json'; file.write_bytes(msgspec.json.encode(spec))\n"
        "command = [sys.executable, '-m', 'rbee.worker', 'run', '--spec', file]\n"
        "child = subprocess.Popen(command, stderr=subprocess.PIPE)\n"
        "for line in child.stderr:\n"
        "    if b'ready after' in line: print(child.pid, flush=True)\n"
    )
    command = [sys.executable, "-c", code, msgspec.json.encode(spec).decode(), str(tmp_path)]
    environment = {**os.environ, "RBEE_HOME": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout
        worker = int(parent.stdout.readline())
        engines = children(worker)
        assert engines
        parent.kill()
    until(lambda: not alive(worker) and not any(map(alive, engines)), "worker and engine to die")


def test_a_killed_worker_takes_its_engine_along(demo_spec: WorkerSpec) -> None:
    with run_worker(demo_spec) as worker:
        engines = worker.children()
        assert engines
        worker.signal(signal.SIGKILL)
        worker.wait()
        until(lambda: not any(map(alive, engines)), "the engine to die")


def test_an_engine_that_dies_in_the_middle_is_told_to_client_hive_and_log(demo_spec: WorkerSpec) -> None:
    with FakeHive() as hive, run_worker(msgspec.structs.replace(demo_spec, hive_url=hive.url)) as worker:
        body = {"model": "rbee-demo", "messages": [user("hi")], "ignore_eos": True, "max_tokens": 1900}
        stream = worker.stream("/v1/chat/completions", body)
        next(stream)
        pid = engine(worker)
        os.kill(pid, signal.SIGSTOP)  # so that the rest of the answer is not on its way already
        os.kill(pid, signal.SIGKILL)
        last = [*stream][-1]
        assert last["error"]["code"] == "worker_lost"
        assert worker.wait() == 1
        assert "engine died" in worker.log.splitlines()[-1]
        assert hive.wait_for(lambda calls: len(calls) == 2)
        assert hive.ready()[-1].state == WorkerState.FAILED


def test_an_engine_that_dies_before_its_first_byte_is_a_502(demo_spec: WorkerSpec) -> None:
    with run_worker(demo_spec) as worker:
        pid = engine(worker)
        os.kill(pid, signal.SIGSTOP)
        connection = socket.create_connection(("127.0.0.1", int(worker.url.rpartition(":")[2])), timeout=60)
        body = json.dumps({"model": "rbee-demo", "messages": [user("hi")]}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {worker.spec.token}\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: worker.health().in_flight == 1, "the job to begin")
        os.kill(pid, signal.SIGKILL)
        answer = connection.makefile("rb").read()
        connection.close()
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert b'"worker_lost"' in answer


def test_the_engines_socket_is_gone_with_the_worker(demo_spec: WorkerSpec, tmp_path: Path) -> None:
    path = tmp_path / "e.sock"
    with run_worker(msgspec.structs.replace(demo_spec, engine_socket=str(path))) as worker:
        assert path.is_socket()
        worker.signal(signal.SIGTERM)
        worker.wait()
        assert not path.exists()


def test_a_socket_path_that_is_too_long_becomes_a_loopback_port(demo_spec: WorkerSpec, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    with FakeHive() as hive:
        spec = msgspec.structs.replace(demo_spec, hive_url=hive.url, engine_socket=str(long / "e.sock"))
        with run_worker(spec) as worker:
            assert hive.ready()[0].engine_url.startswith("http://127.0.0.1:")
            assert worker.chat("hi", max_tokens=2)["usage"]["completion_tokens"] == 2


def engine(worker: RunningWorker) -> int:
    """Return the pid of the engine's process."""
    (pid,) = worker.children()
    return pid


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}
