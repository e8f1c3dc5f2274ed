"""A job's life in the queen: streams, clients that leave, workers that die, scripts, drains."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from rbee.testing.programs import RunningQueen, processes_of, running_queen, until
from rbee.wire.fleet import HiveView, SpawnWorker, WorkerReport, WorkerState

CHAT = "/v1/chat/completions"


def connect(queen: RunningQueen) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)


def chat(model: str, text: str = "one two three", **fields: Any) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": text}], **fields}).encode()


def ask(queen: RunningQueen, body: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = connect(queen)
    try:
        connection.request("POST", CHAT, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def spawn(queen: RunningQueen, **options: str) -> WorkerReport:
    """Start an echo worker with options and wait until it is ready."""
    hive = queen.status().hives[0].hive
    wanted = SpawnWorker(model="echo", backend="echo", options=options)
    name = queen.client.post(f"/v1/hives/{hive}/workers", wanted, WorkerReport).name
    until(lambda: report(queen, name).state is not WorkerState.STARTING, f"{name} to start")
    assert report(queen, name).state is WorkerState.READY, report(queen, name).reason
    return report(queen, name)


def report(queen: RunningQueen, name: str) -> WorkerReport:
    workers = {worker.name: worker for hive in queen.status().hives for worker in hive.workers}
    return workers.get(name) or WorkerReport(name=name, model="", backend="", state=WorkerState.STARTING)


def metric(queen: RunningQueen, start: str) -> float:
    connection = connect(queen)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


@pytest.fixture
def own_queen() -> Iterator[RunningQueen]:
    """Return a queen that the test may break."""
    with running_queen() as running:
        yield running


def test_a_stream_arrives_whole_and_names_its_job_and_worker(queen: RunningQueen) -> None:
    status, headers, body = ask(queen, chat("echo", "a b c", stream=True, stream_options={"include_usage": True}))
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-rbee-job"].startswith("job_")
    assert headers["x-rbee-worker"].endswith("/echo")
    events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == "a b c"
    assert chunks[-1]["usage"]["completion_tokens"] > 0


def test_a_model_is_loaded_once_for_all_who_ask_at_once(own_queen: RunningQueen) -> None:
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(own_queen, chat("rbee-demo"))[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 8
    workers = [worker for hive in own_queen.status().hives for worker in hive.workers]
    assert [worker.model for worker in workers] == ["rbee-demo"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_worker(own_queen: RunningQueen, stream: bool) -> None:
    worker = spawn(own_queen, delay_ms="1000")
    words = "word " * 1000
    for_sure = chat("echo", words, stream=stream)
    parts = urlsplit(own_queen.url)
    sock = socket.create_connection((parts.hostname or "", parts.port or 0))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(for_sure)}\r\n\r\n".encode()
    sock.sendall(head + for_sure)
    if stream:
        sock.recv(10)
    until(lambda: metric(own_queen, "rbee_worker_jobs") == 1, "the job to reach the worker")
    sock.close()
    until(lambda: metric(own_queen, 'rbee_jobs_total{endpoint="/v1/chat/completions"') == 1, "the job to end")
    assert metric(own_queen, "rbee_jobs_in_flight") == 0
    connection = connect(own_queen)
    connection.request("GET", "/metrics")
    assert 'outcome="cancelled"' in connection.getresponse().read().decode()
    connection.close()
    access = own_queen.client_of_hive().get("/v1/workers", list[WorkerReport])[0].access
    assert access is not None

    def idle() -> bool:
        health = http.client.HTTPConnection(urlsplit(access.url).netloc, timeout=10)
        health.request("GET", "/health")
        body = json.loads(health.getresponse().read())
        health.close()
        return bool(body["in_flight"] == 0)

    until(idle, "the worker to be idle")
    assert report(own_queen, worker.name).state is WorkerState.READY


def test_a_worker_that_dies_before_its_first_byte_is_replaced(own_queen: RunningQueen) -> None:
    worker = spawn(own_queen, delay_ms="600000")
    answer: list[tuple[int, dict[str, str], bytes]] = []
    asking = threading.Thread(target=lambda: answer.append(ask(own_queen, chat("echo"))))
    asking.start()
    until(lambda: metric(own_queen, "rbee_worker_jobs") == 1, "the job to reach the worker")
    os.kill(worker.pid, signal.SIGKILL)
    asking.join()
    assert answer[0][0] == 200, answer[0][2]
    assert json.loads(answer[0][2])["choices"][0]["message"]["content"] == "one two three"
    assert metric(own_queen, "rbee_job_retries_total") == 1


def test_a_worker_that_dies_in_the_middle_ends_the_stream_honestly(own_queen: RunningQueen) -> None:
    worker = spawn(own_queen, delay_ms="300")
    connection = connect(own_queen)
    connection.request("POST", CHAT, chat("echo", "word " * 1000, stream=True))
    answer = connection.getresponse()
    first = answer.read1(1000)
    assert b"data:" in first
    os.kill(worker.pid, signal.SIGKILL)
    rest = (first + answer.read()).decode()
    events = [json.loads(line[6:]) for line in rest.splitlines() if line.startswith("data: {")]
    assert "[DONE]" not in rest
    assert events[-1]["error"]["code"] == "worker_lost"
    assert metric(own_queen, 'rbee_streams_broken_total{code="worker_lost"}') == 1
    assert ask(own_queen, chat("echo"))[0] == 200
    connection.close()


def test_silence_is_filled_with_comments(own_queen: RunningQueen) -> None:
    spawn(own_queen, delay_ms="2500")
    _, _, body = ask(own_queen, chat("echo", "a b", stream=True))
    assert b": ping\n\n" in body
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_load_that_fails_says_why(own_queen: RunningQueen) -> None:
    hive = own_queen.status().hives[0].hive
    wanted = SpawnWorker(model="echo", backend="echo", options={"fail": "load"})
    name = own_queen.client.post(f"/v1/hives/{hive}/workers", wanted, WorkerReport).name
    until(lambda: report(own_queen, name).state is WorkerState.FAILED, "the worker to fail")
    assert report(own_queen, name).reason
    assert any(problem.where.endswith(name) for problem in own_queen.status().problems)


def test_a_script_is_followed_and_its_mistakes_are_shown(own_queen: RunningQueen) -> None:
    path = own_queen.home / "config" / "scheduler.rhai"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('fn should_admit(task, depth) { reject("closed for lunch") }')
    until(lambda: own_queen.status().scheduler == str(path), "the script to be in force")
    status, headers, body = ask(own_queen, chat("echo"))
    assert status == 429
    assert "closed for lunch" in json.loads(body)["error"]["message"]
    assert int(headers["retry-after"]) >= 1
    path.write_text("fn route_task(task, workers) { workers.least_loaded( }")
    until(lambda: own_queen.status().scheduler_error, "the mistake to be seen")
    assert f"{path}:1:" in own_queen.status().scheduler_error
    path.write_text("fn route_task(task, workers) { loop {} }")
    until(lambda: not own_queen.status().scheduler_error, "the script to compile")
    assert ask(own_queen, chat("echo"))[0] == 200
    assert "route_task" in own_queen.status().scheduler_error


def test_the_queen_ends_clean_and_takes_everything_along(tmp_path: Path) -> None:
    with running_queen(home=tmp_path) as queen:
        assert ask(queen, chat("echo"))[0] == 200
        assert processes_of(tmp_path)
        queen.process.send_signal(signal.SIGTERM)
        queen.process.wait(60)
        until(lambda: not processes_of(tmp_path), "every process to end")
    assert not (tmp_path / "state" / "queen.json").exists()
    assert not [path for path in (tmp_path / "state" / "run").rglob("*") if not path.is_dir()]


def test_everything_ends_when_the_queen_is_killed(tmp_path: Path) -> None:
    with running_queen(home=tmp_path) as queen:
        assert ask(queen, chat("rbee-demo", max_tokens=1))[0] == 200
        os.kill(queen.record.pid, signal.SIGKILL)
        until(lambda: not processes_of(tmp_path), "every process to end")


def test_a_server_process_that_dies_costs_no_loaded_model(own_queen: RunningQueen) -> None:
    assert ask(own_queen, chat("echo"))[0] == 200
    before = own_queen.client_of_hive().get("/v1/workers", list[WorkerReport])
    [child] = [
        pid for pid, command in processes_of(own_queen.home) if "rbee.queen" in command and pid != own_queen.record.pid
    ]
    os.kill(child, signal.SIGKILL)

    def back() -> bool:
        try:
            hives = own_queen.client.get("/v1/hives", list[HiveView])
        except Exception:  # noqa: BLE001  refused and reset connections until the next process listens
            return False
        return bool(hives and hives[0].workers)

    until(back, "the next server process to know the fleet")
    assert ask(own_queen, chat("echo"))[0] == 200
    after = own_queen.client_of_hive().get("/v1/workers", list[WorkerReport])
    assert [worker.pid for worker in after] == [worker.pid for worker in before]


def test_a_hive_that_dies_comes_back(own_queen: RunningQueen) -> None:
    assert ask(own_queen, chat("echo"))[0] == 200
    pid = own_queen.hive_pid()
    os.kill(pid, signal.SIGKILL)
    until(
        lambda: any(h.state == "ready" and not h.workers for h in own_queen.status().hives), "the hive to report anew"
    )
    assert ask(own_queen, chat("echo"))[0] == 200
    assert own_queen.hive_pid() != pid


def test_streams_end_themselves_before_the_queen_does(tmp_path: Path) -> None:
    with running_queen("--ephemeral", home=tmp_path) as queen:
        spawn(queen, delay_ms="200")
        connection = connect(queen)
        connection.request("POST", CHAT, chat("echo", "word " * 1000, stream=True))
        answer = connection.getresponse()
        answer.read1(100)
        queen.process.send_signal(signal.SIGTERM)
        rest = answer.read().decode()
        connection.close()
    assert "[DONE]" not in rest
    last = [json.loads(line[6:]) for line in rest.splitlines() if line.startswith("data: {")][-1]
    assert last["error"]["code"] == "shutting_down"
