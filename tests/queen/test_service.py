"""The queen as a service that `rbee apply` set up: her settings file, and what she and systemd tell each other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from queen_rig import FleetFolder, settings_file, until_state

from rbee.testing.programs import processes_of, running_queen


@pytest.fixture
def service(tmp_path: Path) -> socket.socket:
    """Return a socket that listens as systemd does."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(tmp_path / "notify"))
    listener.settimeout(60)
    return listener


def test_it_takes_everything_from_its_settings_and_credentials(fleet: FleetFolder, tmp_path: Path) -> None:
    with fleet.hive("one") as one:
        fleet.write(one=one.port)
        environment = {"CREDENTIALS_DIRECTORY": str(fleet.identity)}
        with running_queen("--settings", settings_file(tmp_path, fleet), env=environment) as queen:
            until_state(queen, "one", "ready")
            assert [hive.hive for hive in queen.status().hives] == ["one"]
            assert [model["id"] for model in queen.client.get("/v1/models", dict[str, Any])["data"]] == ["honey"]


def test_an_inventory_that_is_not_there_is_a_problem_and_no_reason_to_stay_down(
    fleet: FleetFolder, tmp_path: Path
) -> None:
    settings = settings_file(tmp_path, fleet, identity=str(fleet.identity))
    with running_queen("--settings", settings) as queen:
        assert [problem.where for problem in queen.status().problems] == [str(fleet.folder)]


def test_a_settings_file_with_a_mistake_ends_it_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "queen.yaml").write_text("port: many\n")
    command = [sys.executable, "-m", "rbee.queen", "run", "--settings", str(tmp_path / "queen.yaml")]
    environment = {**os.environ, "RBEE_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "queen.yaml" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_it_tells_systemd_when_it_serves_and_when_it_ends(service: socket.socket) -> None:
    address = service.getsockname()
    with service, running_queen("--no-hive", env={"NOTIFY_SOCKET": address}) as queen:
        assert service.recv(1000).startswith(b"FDSTORE=1\n")
        ready = service.recv(1000).decode().splitlines()
        assert "READY=1" in ready
        assert any(line.startswith("STATUS=Serving on 127.0.0.1:") for line in ready)
        queen.process.terminate()
        assert "STOPPING=1" in service.recv(1000).decode().splitlines()


def test_its_children_cannot_speak_in_its_name(service: socket.socket) -> None:
    with service, running_queen(env={"NOTIFY_SOCKET": service.getsockname()}) as queen:
        [hive] = [pid for pid, command in processes_of(queen.home) if "rbee.hive run" in command]
        assert b"NOTIFY_SOCKET" not in Path(f"/proc/{hive}/environ").read_bytes()
