"""A worker from its spawn to its end, with real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hive_rig import FakeQueen, RunningHive, StartHive, alive, install, together, until

from rbee.client import Client
from rbee.errors import RbeeError
from rbee.wire.fleet import WorkerHealth, WorkerReport, WorkerState

FAILED, READY, STARTING, DRAINING = WorkerState.FAILED, WorkerState.READY, WorkerState.STARTING, WorkerState.DRAINING


def chat(worker: WorkerReport, text: str) -> str:
    assert worker.access is not None
    client = Client(worker.access.url, token=worker.access.token, timeout_s=60)
    body = {"model": worker.model, "messages": [{"role": "user", "content": text}]}
    answer = client.post("/v1/chat/completions", body, dict)
    client.close()
    return str(answer["choices"][0]["message"]["content"])


def test_spawn_ready_report_answer_stop(start_hive: StartHive, queen: FakeQueen) -> None:
    hive = start_hive("--queen", queen.url, "--name", "here")
    spawned = hive.spawn("echo")
    assert (spawned.name, spawned.state) == ("echo", STARTING)
    ready = hive.worker("echo", READY)
    assert ready.capabilities
    assert ready.slots >= 1
    assert ready.progress == 1.0
    assert ready.memory_bytes > 1_000_000
    assert alive(ready.pid)
    assert chat(ready, "hello bees") == "hello bees"

    told = until(lambda: queen.ready, "the queen to hear that it is ready")[0]
    assert (told.name, told.access) == ("echo", ready.access)
    until(lambda: queen.state_of("echo") is READY, "a report with the ready worker")
    assert queen.tokens == {f"Bearer {hive.token}"}
    assert not (hive.home / "state/run/workers/echo.spec.json").exists(), "the worker has read it"

    assert hive.stop("echo").state is WorkerState.STOPPED
    assert hive.workers() == {}
    assert not alive(ready.pid)
    assert hive.left_in_runtime() == []
    until(lambda: queen.state_of("echo") is None, "a report without it")


def test_a_worker_outlives_the_request_that_asked_for_it(hive: RunningHive) -> None:
    """PR_SET_PDEATHSIG fires when the forking thread ends, and a server's thread ends with its connection."""
    tasks = Path(f"/proc/{hive.pid}/task")
    authorization = {"Authorization": f"Bearer {hive.token}"}
    before = {task.name for task in tasks.iterdir()}
    connection = HTTPConnection("127.0.0.1", urlsplit(hive.url).port)
    connection.request("GET", "/v1/hive", headers=authorization)
    assert connection.getresponse().read()
    (thread,) = {task.name for task in tasks.iterdir()} - before
    connection.request("POST", "/v1/workers", json.dumps({"model": "trial", "backend": "trial"}), authorization)
    assert connection.getresponse().read()
    worker = hive.worker("trial", READY)
    assert (tasks / thread).exists()
    connection.close()
    until(lambda: not (tasks / thread).exists(), "the request's thread to end")
    assert chat(worker, "hello") == "well, done"
    assert hive.workers()["trial"].pid == worker.pid


def test_many_spawned_at_once_get_names_and_ports_of_their_own(hive: RunningHive) -> None:
    spawned = together(lambda: hive.spawn("trial"), 6)
    names = sorted(worker.name for worker in spawned)
    assert names == ["trial", "trial-2", "trial-3", "trial-4", "trial-5", "trial-6"]
    assert len({worker.port for worker in spawned}) == 6
    assert min(worker.port for worker in spawned) >= 8001
    for name in names:
        hive.worker(name, READY)


def test_two_spawns_of_the_same_name_at_once_start_one(hive: RunningHive) -> None:
    results = together(lambda: hive.spawn("trial", name="mine"), 8)
    started = [result for result in results if isinstance(result, WorkerReport)]
    refused = [result for result in results if isinstance(result, RbeeError)]
    assert len(started) == 1
    assert {(problem.status, "runs already" in str(problem)) for problem in refused} == {(400, True)}
    hive.worker("mine", READY)


def test_a_port_that_is_taken_is_refused_or_skipped(hive: RunningHive) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RbeeError, match=f"Port {port} .* is in use") as caught:
            hive.spawn("trial", port=port)
        assert caught.value.code == "port_in_use"
    assert hive.ready("trial", port=port).port == port
    with pytest.raises(RbeeError, match=f"Port {port} .* is in use"):
        hive.spawn("trial", port=port)


def test_a_port_that_is_lost_at_the_last_moment_is_replaced(
    start_hive: StartHive, plugins: Path, tmp_path: Path
) -> None:
    install(plugins, {"trial-thief": "Thief"})
    hive = start_hive("--ephemeral", TRIAL_THIEF=str(tmp_path / "thief"))
    worker = hive.ready("trial-thief")
    thief, port = (int(number) for number in (tmp_path / "thief").read_text().split())
    try:
        assert worker.port != port
        assert chat(worker, "hello") == "well, done"
        assert "lost port" in hive.log()
    finally:
        with suppress(ProcessLookupError):  # a third program on this machine may have been quicker than the thief
            os.kill(thief, signal.SIGKILL)


FAILURES = {
    "a reason that the engine gives": ({"fail": "load"}, "echo", "fail=load says so"),
    "the last line that it wrote": ({"die": "print"}, "trial", "trial: the file is damaged (exit code 7)"),
    "its exit code": ({"die": "exit"}, "trial", "exit code 7"),
    "its signal": ({"die": "kill"}, "trial", "killed by SIGKILL"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_worker_that_fails_to_load_says_why_and_stays_listed(hive: RunningHive, case: str) -> None:
    options, model, reason = FAILURES[case]
    name = hive.spawn(model, options=options).name
    worker = hive.worker(name, FAILED)
    assert reason in worker.reason
    assert "Traceback" not in worker.reason
    assert "\x1b" not in worker.reason
    assert (worker.pid, worker.access) == (0, None)
    until(lambda: hive.left_in_runtime() == [], "nothing to be left of it")
    assert hive.stop(name).state is WorkerState.STOPPED
    assert hive.workers() == {}


def test_a_worker_that_is_killed_while_ready_is_told_to_the_queen(start_hive: StartHive, queen: FakeQueen) -> None:
    hive = start_hive("--queen", queen.url)
    worker = hive.ready("trial")
    os.kill(worker.pid, signal.SIGKILL)
    assert hive.worker("trial", FAILED).reason == "killed by SIGKILL"
    until(lambda: queen.state_of("trial") is FAILED, "the queen to hear of it")
    assert hive.left_in_runtime() == []
    again = hive.ready("trial")
    assert again.name == "trial", "a failed worker does not hold its name"
    assert again.pid != worker.pid
    assert again.reason == ""


def test_a_load_that_takes_too_long_is_ended(start_hive: StartHive, tmp_path: Path) -> None:
    hive = start_hive("--ephemeral", "--load-limit", "0.5")
    hive.spawn("trial", options={"until": str(tmp_path / "never")})
    worker = hive.worker("trial", FAILED)
    assert "not loaded within 0.5 s" in worker.reason
    until(lambda: hive.left_in_runtime() == [], "its process to end")


def test_progress_is_seen_while_it_loads(hive: RunningHive, tmp_path: Path) -> None:
    hive.spawn("trial", options={"until": str(tmp_path / "go")})
    until(lambda: hive.workers()["trial"].progress == 0.25, "the progress that the engine tells")
    (tmp_path / "go").touch()
    assert hive.worker("trial", READY).progress == 1.0


def test_stop_while_it_loads(hive: RunningHive, tmp_path: Path) -> None:
    hive.spawn("trial", options={"until": str(tmp_path / "never")})
    pid = until(lambda: hive.workers()["trial"].pid)
    assert hive.stop("trial").state is WorkerState.STOPPED
    assert not alive(pid)
    assert hive.workers() == {}


def test_stop_at_the_moment_of_the_spawn(hive: RunningHive) -> None:
    for _ in range(10):
        hive.spawn("trial")
        assert hive.stop("trial").state is WorkerState.STOPPED
    assert hive.workers() == {}
    until(lambda: hive.left_in_runtime() == [], "nothing to be left")


def test_stop_twice(hive: RunningHive, tmp_path: Path) -> None:
    hive.ready("trial")
    results = together(lambda: hive.stop("trial"), 4)
    assert {getattr(result, "state", None) or getattr(result, "status", None) for result in results} <= {
        WorkerState.STOPPED,
        404,
    }
    with pytest.raises(RbeeError, match=r"no worker named 'trial' here\. Workers: none"):
        hive.stop("trial")


def test_stop_lets_a_running_job_end_and_takes_no_new_one(hive: RunningHive, tmp_path: Path) -> None:
    worker = hive.ready("trial", options={"answer_until": str(tmp_path / "go")})
    assert worker.access is not None
    health = Client(worker.access.url, token=worker.access.token)
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(chat(worker, "hello")))
    asking.start()
    until(lambda: health.get("/health", WorkerHealth).in_flight == 1, "the job to run")
    report = hive.client.send("DELETE", "/v1/workers/trial?wait=0").read()
    assert json.loads(report)["state"] == "draining"
    assert hive.workers()["trial"].state is DRAINING
    until(lambda: _is_not_ready(health), "the worker to drain")
    with pytest.raises(RbeeError) as refused:
        chat(worker, "another")
    assert refused.value.status == 503
    (tmp_path / "go").touch()
    asking.join(60)
    assert answers == ["well, done"]
    until(lambda: hive.workers() == {}, "the worker to end")
    health.close()


def _is_not_ready(worker: Client) -> bool:
    try:
        worker.get("/health", WorkerHealth)
    except RbeeError as problem:
        return problem.status == 503
    return False


def test_a_worker_takes_what_it_started_with_it(hive: RunningHive, tmp_path: Path) -> None:
    worker = hive.ready("trial", options={"child": str(tmp_path / "pid")})
    child = int((tmp_path / "pid").read_text())
    assert alive(child)
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: not alive(child), "the worker's own child to end")


def test_only_so_many_failures_are_kept(start_hive: StartHive) -> None:
    hive = start_hive("--ephemeral")
    for number in range(23):
        name = f"w{number}"
        hive.spawn("trial", name=name, options={"die": "exit"})
        hive.worker(name, FAILED)
    assert list(hive.workers()) == [f"w{number}" for number in range(3, 23)]


def test_the_log_of_a_worker(hive: RunningHive) -> None:
    hive.ready("trial")
    text = hive.client.send("GET", "/v1/workers/trial/log?lines=1").read().decode()
    assert text.count("\n") == 1
    assert "ready" in text
    with pytest.raises(RbeeError, match="no worker named"):
        hive.client.send("GET", "/v1/workers/nobody/log")
    with pytest.raises(RbeeError, match="lines must be a number"):
        hive.client.send("GET", "/v1/workers/trial/log?lines=many")
