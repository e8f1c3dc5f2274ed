"""The workers that the inventory declares: the hive watches and reports them, and leaves them to systemd."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from declared_rig import LISTENS, WORKER_TOKEN, Fleet, report, reported
from fleet_certificates import make_authority
from hive_rig import RunningHive, until

from rbee.client import Client
from rbee.errors import RbeeError, Unreachable
from rbee.wire.fleet import ModelReport, SpawnWorker, WorkerReport, WorkerState
from rbee.wire.settings import DeclaredModel

READY, FAILED, STOPPED = WorkerState.READY, WorkerState.FAILED, WorkerState.STOPPED


@pytest.fixture
def fleet(tmp_path: Path, environment: dict[str, str]) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path / "host", make_authority(tmp_path / "authority"), environment)
    yield fleet
    fleet.end()


def failed_for(hive: RunningHive, name: str, reason: str) -> None:
    """Wait until a worker is failed for this reason; one that is slow to start may be failed for another before."""
    until(lambda: reason in reported(hive, name, FAILED).reason, f"{name} to be failed for {reason!r}")


def test_a_worker_that_runs_is_reported_with_how_to_reach_it(fleet: Fleet) -> None:
    settings = fleet.declare("tiny", pin=True, slots=3, context_tokens=512)
    process = fleet.run_worker(settings)
    hive = fleet.hive()
    worker = reported(hive, "tiny", READY)
    assert (worker.declared, worker.pinned, worker.pid, worker.backend) == (True, True, process.pid, "echo")
    assert "chat" in worker.capabilities
    assert worker.memory_bytes > 1_000_000
    assert worker.access
    assert worker.access.url == f"https://127.0.0.1:{settings.port}"
    client = Client(worker.access.url, token=worker.access.token, tls=fleet.authority.trusted)
    assert client.get("/v1/models", dict)["data"][0]["id"] == "echo"
    client.close()
    assert report(hive).hive == "Machine-1"


def test_a_hive_that_starts_again_reports_its_workers_at_once_and_has_not_touched_them(fleet: Fleet) -> None:
    process = fleet.run_worker(fleet.declare("tiny"))
    hive = fleet.hive()
    reported(hive, "tiny", READY)
    hive.kill()
    again = fleet.hive()
    (worker,) = report(again).workers
    assert (worker.state, worker.pid) == (READY, process.pid)
    assert again.terminate() == 0
    assert process.poll() is None


def test_a_worker_that_dies_is_failed_with_what_systemd_says(fleet: Fleet) -> None:
    process = fleet.run_worker(fleet.declare("tiny"))
    hive = fleet.hive()
    reported(hive, "tiny", READY)
    fleet.unit(
        "tiny",
        LoadState="loaded",
        ActiveState="activating",
        SubState="auto-restart",
        Result="signal",
        ExecMainCode=2,
        ExecMainStatus=9,
        NRestarts=1,
        MainPID=0,
    )
    process.kill()
    worker = reported(hive, "tiny", FAILED)
    assert worker.reason == "killed by signal 9; systemd starts it again"
    assert worker.access is None


@pytest.mark.parametrize(
    ("properties", "state", "reason"),
    [
        ({"ActiveState": "inactive", "SubState": "dead", "Result": "success"}, STOPPED, "systemctl start"),
        ({"ActiveState": "failed", "Result": "oom-kill"}, FAILED, "oom-kill"),
        ({"ActiveState": "failed", "Result": "watchdog"}, FAILED, "no sign of life"),
        (
            {"ActiveState": "failed", "Result": "exit-code", "ExecMainCode": 1, "ExecMainStatus": 1},
            FAILED,
            "no such model (exit code 1)",
        ),
        (
            {
                "ActiveState": "failed",
                "Result": "start-limit-hit",
                "ExecMainCode": 1,
                "ExecMainStatus": 3,
                "StatusText": "failed: the file is damaged",
            },
            FAILED,
            "the file is damaged (it failed too often in a row (start-limit-hit, exit code 3))",
        ),
        ({"LoadState": "not-found", "ActiveState": "inactive"}, FAILED, "rbee apply installs it"),
        ({"ActiveState": "activating", "SubState": "start", "MainPID": "1"}, WorkerState.STARTING, ""),
    ],
    ids=str,
)
def test_each_state_of_a_unit(fleet: Fleet, properties: dict[str, str], state: WorkerState, reason: str) -> None:
    (fleet.units / "journal").write_text(
        "2026-01-01 00:00:00 INFO loading\nno such model\n2026-01-01 00:00:01 INFO x\n"
    )
    fleet.declare("tiny")
    fleet.unit("tiny", "socket", **LISTENS)
    fleet.unit("tiny", **{"LoadState": "loaded", **properties})
    worker = reported(fleet.hive(), "tiny", state)
    assert reason in worker.reason


def test_a_port_that_another_program_has_is_named(fleet: Fleet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        port = squatter.getsockname()[1]
        fleet.declare("tiny", port=port)
        fleet.unit("tiny", "socket", LoadState="loaded", ActiveState="failed", Result="resources")
        fleet.unit("tiny", LoadState="loaded", ActiveState="inactive", Result="success")
        worker = reported(fleet.hive(), "tiny", FAILED)
    assert worker.reason.startswith(f"port {port} is taken by another program")


def test_a_connection_never_starts_a_worker_that_is_stopped(fleet: Fleet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        fleet.declare("tiny", port=listener.getsockname()[1])
        fleet.unit("tiny", "socket", **LISTENS)
        fleet.unit("tiny", LoadState="loaded", ActiveState="inactive", Result="success", MainPID=0)
        hive = fleet.hive()
        reported(hive, "tiny", STOPPED)
        fleet.unit("tiny", LoadState="loaded", ActiveState="failed", Result="oom-kill", MainPID=0)
        reported(hive, "tiny", FAILED)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_another_authority_and_another_token_are_told_apart(fleet: Fleet, tmp_path: Path) -> None:
    settings = fleet.declare("tiny")
    fleet.run_worker(settings)
    (fleet.tokens / "tiny").write_text("yesterdays-token")
    hive = fleet.hive()
    failed_for(hive, "tiny", "another token")
    hive.terminate()
    stranger = make_authority(tmp_path / "stranger")
    (fleet.credentials / "ca.crt").write_bytes(stranger.file.read_bytes())
    (fleet.tokens / "tiny").write_text(WORKER_TOKEN)
    again = fleet.hive(authority=str(stranger.file))
    failed_for(again, "tiny", "certificate is refused")


def test_a_worker_that_hangs_is_failed_and_hinders_no_other(fleet: Fleet) -> None:
    process = fleet.run_worker(fleet.declare("hangs"))
    fleet.run_worker(fleet.declare("lives"))
    hive = fleet.hive()
    reported(hive, "hangs", READY)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        failed_for(hive, "hangs", "did not answer")
        assert reported(hive, "lives", READY)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    reported(hive, "hangs", READY)


def test_without_an_answer_of_systemd_the_workers_own_word_counts(fleet: Fleet) -> None:
    fleet.run_worker(fleet.declare("tiny"))
    (fleet.folder / "bin" / "systemctl").write_text("#!/bin/sh\necho no bus >&2\nexit 1\n")
    hive = fleet.hive()
    assert reported(hive, "tiny", READY)


def test_the_folder_is_followed(fleet: Fleet) -> None:
    hive = fleet.hive()
    assert report(hive).workers == []
    fleet.run_worker(fleet.declare("tiny"))
    reported(hive, "tiny", READY)
    (fleet.workers / "broken.yaml").write_text("name: [")
    assert "broken.yaml" in reported(hive, "broken", FAILED).reason
    fleet.declare("broken")
    fleet.unit("broken", LoadState="loaded", ActiveState="inactive", Result="success")
    reported(hive, "broken", STOPPED)
    (fleet.tokens / "nameless").write_text("")
    (fleet.workers / "nameless.yaml").write_text((fleet.workers / "tiny.yaml").read_text())
    assert "nameless" in reported(hive, "nameless", FAILED).reason
    for name in ("broken", "nameless"):
        (fleet.workers / f"{name}.yaml").unlink()
    until(lambda: [worker.name for worker in report(hive).workers] == ["tiny"], "two workers to be forgotten")


def test_the_tokens_may_be_credentials_of_the_unit(fleet: Fleet) -> None:
    fleet.run_worker(fleet.declare("tiny"))
    (fleet.tokens / "tiny").unlink()
    (fleet.credentials / "worker-tokens_tiny").write_text(WORKER_TOKEN)
    assert reported(fleet.hive(worker_tokens="worker-tokens"), "tiny", READY)


def refused(hive: RunningHive, method: str, path: str, body: object = None) -> str:
    with pytest.raises(RbeeError) as refusal:
        hive.client.send(method, path, body).read()
    assert refusal.value.status == 400
    return str(refusal.value)


def test_what_is_declared_is_neither_taken_nor_stopped(fleet: Fleet) -> None:
    settings = fleet.declare("tiny")
    process = fleet.run_worker(settings)
    hive = fleet.hive()
    reported(hive, "tiny", READY)
    assert "declares a worker 'tiny'" in refused(
        hive, "POST", "/v1/workers", SpawnWorker(model="echo", backend="", name="tiny")
    )
    taken = refused(hive, "POST", "/v1/workers", SpawnWorker(model="echo", backend="", port=settings.port))
    assert f"port {settings.port}" in taken
    assert "rbee apply" in refused(hive, "DELETE", "/v1/workers/tiny")
    assert process.poll() is None


def test_a_worker_on_demand_beside_them_speaks_tls_too(fleet: Fleet) -> None:
    fleet.run_worker(fleet.declare("echo"))
    hive = fleet.hive()
    spawned = hive.client.post("/v1/workers", SpawnWorker(model="echo", backend="echo"), WorkerReport)
    assert spawned.name == "echo-2"
    worker = reported(hive, "echo-2", READY, FAILED)
    assert worker.state is READY, worker.reason
    assert worker.access
    assert worker.access.url.startswith("https://127.0.0.1:")
    client = Client(worker.access.url, token=worker.access.token, tls=fleet.authority.trusted)
    assert client.get("/v1/models", dict)["data"]
    client.close()
    assert not worker.declared


def test_declared_models_are_listed_and_left_to_the_inventory(fleet: Fleet) -> None:
    import rbee

    file = Path(rbee.__file__).parent / "models" / "rbee-demo.gguf"
    models = [DeclaredModel(name="ours", path=str(file)), DeclaredModel(name="gone", path="/nowhere/gone.gguf")]
    hive = fleet.hive(models=models)
    listed = {model.name: model for model in hive.client.get("/v1/models", list[ModelReport])}
    assert listed["ours"].format == "gguf"
    assert listed["ours"].capabilities
    assert "rbee apply" in listed["gone"].problem
    assert "Model line" in refused(hive, "DELETE", "/v1/models/ours")
    assert "Model line" in refused(hive, "POST", "/v1/models", {"path": str(file), "name": "ours"})


def test_the_journal_is_the_log(fleet: Fleet) -> None:
    fleet.declare("tiny")
    (fleet.units / "journal").write_text("a line of the worker\n")
    hive = fleet.hive()
    assert hive.client.send("GET", "/v1/workers/tiny/log").read() == b"a line of the worker\n"


def test_the_hive_itself_takes_nobody_without_tls_and_its_token(fleet: Fleet, tmp_path: Path) -> None:
    hive = fleet.hive()
    for client in (
        Client(hive.url.replace("https", "http"), token=hive.token),
        Client(hive.url, token="wrong", tls=fleet.authority.trusted),
    ):
        with pytest.raises(RbeeError):
            client.send("GET", "/v1/hive").read()
        client.close()
    stranger = Client(hive.url, token=hive.token, tls=make_authority(tmp_path / "stranger").trusted)
    with pytest.raises(Unreachable, match="certificate is refused"):
        stranger.send("GET", "/v1/hive")


def test_systemd_that_hangs_does_not_hold_the_hive_up(fleet: Fleet) -> None:
    (fleet.units / "hangs").touch()
    fleet.run_worker(fleet.declare("tiny"))
    hive = fleet.hive()
    assert hive.client.get("/health", dict)["status"] == "ok"
    assert report(hive).workers[0].name == "tiny"
    (fleet.units / "hangs").unlink()
    reported(hive, "tiny", READY)
