"""The other names: `rbee-keeper`, `queen-rbee`, `rbee-hive` and `worker-rbee`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.request
from pathlib import Path

from cli_rig import HANG_GUARD_S, Person, wait_until

import rbee

DEMO = Path(rbee.__file__).parent / "models" / "rbee-demo.gguf"


def ended(running: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    running.send_signal(signal.SIGTERM)
    stdout, stderr = running.communicate(timeout=HANG_GUARD_S)
    return running.returncode, stdout + stderr


def test_rbee_keeper_is_rbee(person: Person) -> None:
    done = person.rbee("infer", "--model", "echo", "--prompt", "hello", program="rbee-keeper")
    assert (done.returncode, done.stdout) == (0, "hello\n")
    assert "try: rbee-keeper --help" in person.rbee("nothing", program="rbee-keeper").stderr


def test_queen_rbee_daemon_is_the_queen(person: Person) -> None:
    running = person.start("daemon", "--port", "0", "--hive-port", "0", program="queen-rbee")
    wait_until((person.home / "state" / "queen.json").exists, "the queen listens")
    assert person.rbee("infer", "-q", "-m", "echo", "-p", "Hi").stdout == "Hi\n"
    assert ended(running)[0] == 0
    wait_until(lambda: not person.processes(), "all end")


def test_rbee_hive_daemon_and_its_workers_without_a_queen(person: Person) -> None:
    alone = person.rbee("worker", "spawn", "cpu", "--model", "rbee-demo", program="rbee-hive")
    assert alone.returncode == 3
    assert "rbee-hive daemon" in alone.stderr
    running = person.start("daemon", "--port", "0", program="rbee-hive")
    wait_until(lambda: (person.home / "state" / "hive.json").exists(), "the hive listens")
    wait_until(
        lambda: person.rbee("worker", "spawn", "cpu", "--model", "rbee-demo", program="rbee-hive").returncode == 0,
        "the hive starts a worker",
    )
    done = person.rbee("worker", "spawn", "cuda", "--model", "rbee-demo", "--gpu", "0", program="rbee-hive")
    assert done.returncode == 2
    assert "cuda" in done.stderr
    assert ended(running)[0] == 0
    wait_until(lambda: not person.processes(), "all end")


def test_worker_rbee_serves_a_file_on_a_device(person: Person) -> None:
    running = person.start("--backend", "cpu", "--model", str(DEMO), "--port", "0", program="worker-rbee")
    assert running.stderr is not None
    try:
        port = listening_port(running.pid)
        wait_until(lambda: healthy(port), "the worker is ready")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=HANG_GUARD_S) as answer:
            assert json.load(answer)["data"][0]["id"] == "rbee-demo"
    finally:
        code, output = ended(running)
    assert code == 0, output


def test_worker_rbee_takes_an_engine_by_name(person: Person) -> None:
    running = person.start("--backend", "echo", "--port", "0", program="worker-rbee")
    port = listening_port(running.pid)
    wait_until(lambda: healthy(port), "the worker is ready")
    assert ended(running)[0] == 0


def test_worker_rbee_refuses_what_is_no_model(person: Person) -> None:
    (person.folder / "x.gguf").write_text("no model")
    done = person.rbee("--backend", "cpu", "--model", "x.gguf", program="worker-rbee")
    assert done.returncode == 2
    assert "x.gguf" in done.stderr
    assert person.rbee("--backend", "nothing", "--model", str(DEMO), program="worker-rbee").returncode == 1


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=HANG_GUARD_S) as answer:
            return bool(json.load(answer)["status"] == "ready")
    except OSError:
        return False


def listening_port(pid: int) -> int:
    """Return the first TCP port that a process listens on (proc(5))."""

    def port() -> int:
        inodes = set()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", str(link.readlink())))
            except OSError:
                continue
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                return int(fields[1].split(":")[1], 16)
        return 0

    wait_until(port, "it listens")
    return port()
