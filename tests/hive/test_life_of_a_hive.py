"""A hive from its start to its end, by any death."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from hive_rig import HANG_GUARD_S, FakeQueen, RunningHive, StartHive, alive, processes_of, until

from rbee.hive.instance import HiveRecord, Instance
from rbee.hive.launch import ProcessRecord
from rbee.hive.lock import Lock
from rbee.hive.settings import local_name
from rbee.wire.fleet import WorkerState


def test_sigterm_stops_the_workers_and_leaves_nothing(hive: RunningHive, tmp_path: Path) -> None:
    pids = [hive.ready("trial").pid, hive.ready("trial").pid]
    hive.spawn("trial", options={"until": str(tmp_path / "never")})
    pids.append(until(lambda: hive.workers()["trial-3"].pid))
    assert hive.terminate() == 0
    assert not any(alive(pid) for pid in pids)
    assert hive.left_in_runtime() == []


def test_a_worker_that_hangs_does_not_keep_the_hive(hive: RunningHive) -> None:
    worker = hive.ready("trial")
    os.kill(worker.pid, signal.SIGSTOP)
    assert hive.terminate() == 0
    assert not alive(worker.pid)


def test_a_second_signal_hurries(start_hive: StartHive) -> None:
    hive = start_hive()
    os.kill(hive.ready("trial").pid, signal.SIGSTOP)
    hive.process.send_signal(signal.SIGINT)
    until(lambda: hive.client.get("/health", dict)["status"] == "draining", "the hive to drain")
    assert hive.process.poll() is None
    hive.process.send_signal(signal.SIGINT)
    assert hive.process.wait(HANG_GUARD_S) == 0


def test_a_signal_that_linux_gives_to_another_thread_stops_it_too(hive: RunningHive) -> None:
    """A main thread that waits for a lock sleeps through a signal that interrupts another thread."""
    others = [int(task.name) for task in Path(f"/proc/{hive.pid}/task").iterdir() if int(task.name) != hive.pid]
    assert ctypes.CDLL(None).tgkill(hive.pid, others[0], int(signal.SIGTERM)) == 0
    assert hive.process.wait(HANG_GUARD_S) == 0


def test_the_last_report_has_no_workers(start_hive: StartHive, queen: FakeQueen) -> None:
    hive = start_hive("--queen", queen.url)
    hive.ready("trial")
    assert hive.terminate() == 0
    assert queen.reports[-1].workers == []


def test_kill_9_takes_the_workers_along_and_the_next_start_cleans_up(start_hive: StartHive, tmp_path: Path) -> None:
    hive = start_hive()
    ready = hive.ready("trial", options={"child": str(tmp_path / "pid")})
    hive.spawn("trial", options={"until": str(tmp_path / "never")})
    loading = until(lambda: hive.workers()["trial-2"].pid)
    child = int((tmp_path / "pid").read_text())
    hive.kill()
    until(lambda: not alive(ready.pid) and not alive(loading), "the workers to die with their hive")
    assert {"trial.json", "trial-2.json", "trial-2.spec.json"} <= set(hive.left_in_runtime())
    assert alive(child), "nobody ends what a killed worker started, but the next hive"

    after = start_hive("--ephemeral")
    assert not alive(child)
    assert after.left_in_runtime() == []
    assert after.workers() == {}
    assert after.ready("trial").name == ready.name


def test_kill_9_at_the_moment_of_the_spawn(start_hive: StartHive, home: Path) -> None:
    """The worker may not have asked for its parent's death signal yet when the parent dies."""
    for _ in range(5):
        hive = start_hive()
        hive.spawn("trial")
        hive.kill()
        until(lambda: processes_of(home) == [], "the worker to end")
    assert start_hive("--ephemeral").left_in_runtime() == []


def test_a_process_that_got_an_orphans_number_is_spared(start_hive: StartHive, home: Path) -> None:
    folder = home / "state/run/workers"
    folder.mkdir(parents=True)
    stranger = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        command = [sys.executable, "-m", "rbee.worker", "run", "--spec", str(folder / "w.spec.json")]
        record = ProcessRecord(name="w", pid=stranger.pid, start_ticks=1, command=command)
        (folder / "w.json").write_bytes(msgspec.json.encode(record))
        (folder / "half.json").write_text('{"name": "half", "pi')
        (folder / "w.sock").touch()
        hive = start_hive("--ephemeral")
        assert hive.left_in_runtime() == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_it_ends_with_its_parent(environment: dict[str, str], home: Path) -> None:
    script = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-m', 'rbee.hive', 'run', '--port', '0', '--parent', str(os.getpid())])\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline().startswith("listening on ")
    parent.stdout.close()
    parent.kill()
    parent.wait()
    until(lambda: processes_of(home) == [], "the hive to end with its parent")


def test_a_second_hive_says_that_one_runs(hive: RunningHive, start_hive: StartHive) -> None:
    second = start_hive(port=urlsplit(hive.url).port or 0)
    assert second.process.wait(HANG_GUARD_S) == 0
    assert second.first_line == f"a hive already runs on this machine (pid {hive.pid})"
    assert hive.client.get("/health", dict)["pid"] == hive.pid


def test_a_second_hive_elsewhere_in_the_same_folder_is_refused(hive: RunningHive, start_hive: StartHive) -> None:
    second = start_hive()
    assert second.process.wait(HANG_GUARD_S) == 1
    assert f"A hive already runs here at {hive.url} (pid {hive.pid})" in hive.log()
    assert hive.ready("trial").state is WorkerState.READY


def test_the_same_persons_hive_of_another_folder_is_recognised(
    hive: RunningHive, environment: dict[str, str], tmp_path: Path
) -> None:
    port = str(urlsplit(hive.url).port)
    arguments = [sys.executable, "-m", "rbee.hive", "run", "--port", port]
    elsewhere = {**environment, "RBEE_HOME": str(tmp_path / "elsewhere")}
    theirs = subprocess.run(arguments, env=elsewhere, capture_output=True, text=True, timeout=HANG_GUARD_S, check=False)
    assert theirs.returncode == 1
    assert f"Port {port} on 127.0.0.1 is in use" in theirs.stderr
    arguments += ["--token-file", str(hive.home / "state/hive.token")]
    mine = subprocess.run(arguments, env=elsewhere, capture_output=True, text=True, timeout=HANG_GUARD_S, check=False)
    assert (mine.returncode, mine.stdout) == (0, f"a hive already runs on this machine (pid {hive.pid})\n")


def test_a_port_held_by_a_stranger(start_hive: StartHive) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        hive = start_hive(port=port)
        assert hive.process.wait(HANG_GUARD_S) == 1
    assert f"Port {port} on 127.0.0.1 is in use by another program" in hive.log()


def test_a_new_hive_waits_for_one_that_drains(start_hive: StartHive) -> None:
    first = start_hive()
    worker = first.ready("trial")
    os.kill(worker.pid, signal.SIGSTOP)  # so that the first one takes its whole time
    first.process.send_signal(signal.SIGTERM)
    until(lambda: first.client.get("/health", dict)["status"] == "draining")
    second = start_hive("--ephemeral", port=urlsplit(first.url).port or 0)
    assert second.first_line == f"listening on {first.url}"
    assert first.process.wait(HANG_GUARD_S) == 0


def test_the_epoch_rises_although_the_clock_was_set_back(tmp_path: Path) -> None:
    path = tmp_path / "hive.json"
    future = HiveRecord(pid=1, url="http://127.0.0.1:1", epoch=9e9, version="0")
    path.write_bytes(msgspec.json.encode(future))
    mine = Instance(path, Lock(path))
    assert mine.epoch > 9e9
    mine.close()


def test_the_token_is_private_and_stays(start_hive: StartHive) -> None:
    first = start_hive()
    file = first.home / "state/hive.token"
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(first.token) >= 43
    first.terminate()
    assert start_hive("--ephemeral").token == first.token


def test_a_token_file_that_is_missing_or_empty(start_hive: StartHive, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name, words in (("missing", "cannot be read"), ("empty", "holds no token")):
        hive = start_hive("--token-file", str(tmp_path / name))
        assert hive.process.wait(HANG_GUARD_S) == 1
        assert words in hive.log()


def test_command_lines_that_are_wrong(start_hive: StartHive) -> None:
    for arguments in (("--queen", "localhost:7833"), ("--name", "a b"), ("--host", "no.such.host.invalid")):
        hive = start_hive(*arguments)
        assert hive.process.wait(HANG_GUARD_S) in (1, 2)
        assert arguments[1] in hive.log()


def test_names_of_machines() -> None:
    assert local_name("Mac-Studio.local") == "mac-studio"
    assert local_name("büro_pc") == "b-ro-pc"
    assert local_name("") == "localhost"
    assert local_name("...") == "localhost"
    assert local_name("x" * 80) == "x" * 63
