"""rbee's own units on a real systemd: who ends with whom, what a worker can reach, what a person is told."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Rig, wait_until

sys.path.insert(0, str(Path(__file__).parent.parent))

from units_rig import FIRST_PORT, LEASE_S, Host, install, worker_files, write

from rbee.wire.fleet import WorkerState

TINY, OTHER, HIVE = "rbee-worker@tiny.service", "rbee-worker@other.service", "rbee-hive.service"
MOST_EXPOSURE = 1.5
QUESTION = {"model": "rbee-demo", "messages": [{"role": "user", "content": "How do I add a machine?"}], "max_tokens": 8}


@pytest.fixture(scope="module")
def host(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with rig.machines(1) as [machine]:
        host = install(machine, tmp_path_factory.mktemp("fleet"), ["tiny", "other"])
        machine.ssh("systemctl start rbee.target")
        for name in ("tiny", "other"):
            host.reported(name, WorkerState.READY)
        yield host


@pytest.fixture(autouse=True)
def well(host: Host) -> Iterator[None]:
    """Every test begins and ends with all units as the inventory has them."""
    yield
    host.machine.ssh("systemctl reset-failed; systemctl start rbee.target")
    for name in ("tiny", "other"):
        host.reported(name, WorkerState.READY)


def test_a_worker_without_a_network_answers_over_tls_through_its_sandbox(host: Host) -> None:
    client = host.worker_client()
    answer = client.post("/v1/chat/completions", QUESTION, dict)
    client.close()
    assert answer["choices"][0]["message"]["content"]
    assert host.show(TINY, "StatusText")["StatusText"] == "ready, rbee-demo with xllamacpp"
    links = host.machine.console(f"nsenter --target={host.pid(TINY)} --net ip -brief link").stdout.split("\n")
    assert [line.split()[0] for line in links if line] == ["lo"]


def test_the_sandboxes_are_strict(host: Host) -> None:
    for unit in (TINY, HIVE):
        table = host.machine.console(f"systemd-analyze security --no-pager {unit}").stdout
        exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", table)
        assert exposure
        assert float(exposure[1]) <= MOST_EXPOSURE, table


def test_a_worker_can_read_no_secret_and_no_other_worker(host: Host) -> None:
    users = {host.machine.console(f"stat -c %u /proc/{host.pid(unit)}").stdout.strip() for unit in (TINY, OTHER)}
    assert len(users) == 2
    uid = host.machine.console(f"stat -c %u /proc/{host.pid(TINY)}").stdout.strip()
    inside = f"nsenter --target={host.pid(TINY)} --mount setpriv --reuid={uid} --regid={uid} --clear-groups"
    for path in ("/etc/rbee/secrets/host.key", "/etc/rbee/worker-tokens/other", "/run/rbee-worker/other/engine.sock"):
        assert host.machine.console(f"test -e {path}").returncode == 0
        assert host.machine.console(f"{inside} test -r {path}", check=False).returncode != 0
    assert host.machine.console(f"{inside} ls /var/lib/rbee").stdout.split() == ["models"]


def test_a_hive_that_dies_or_restarts_leaves_its_workers_alone(host: Host) -> None:
    before = host.pid(TINY), host.pid(OTHER)
    hive = host.pid(HIVE)
    host.machine.console(f"kill -9 {hive}")
    wait_until(lambda: host.pid(HIVE) not in (0, hive) and host.state(HIVE) == "active", "the hive to be back")
    host.machine.console(f"systemctl restart {HIVE}")
    assert host.state("rbee-lease.timer") == "inactive"
    assert (host.pid(TINY), host.pid(OTHER)) == before
    assert {worker.pid for worker in host.workers().values()} == set(before)


def test_workers_end_when_their_hive_does_not_come_back_and_return_with_it(host: Host) -> None:
    host.machine.console(f"systemctl stop {HIVE}")
    assert host.state("rbee-lease.timer") == "active"
    assert host.state(TINY) == "active"
    units = (TINY, OTHER, "rbee-worker@tiny.socket", "rbee-worker@other.socket")
    wait_until(lambda: all(host.state(unit) == "inactive" for unit in units), "the workers to end", LEASE_S + 60)
    host.machine.console(f"systemctl start {HIVE}")
    host.reported("tiny", WorkerState.READY)
    host.reported("other", WorkerState.READY)
    assert host.state("rbee-lease.timer") == "inactive"


def test_a_hive_that_dies_at_each_start_does_not_keep_the_workers(host: Host) -> None:
    host.machine.console("mv /etc/rbee/hive.yaml /var/tmp; echo 'name: [' > /etc/rbee/hive.yaml")
    try:
        host.machine.console(f"kill -9 {host.pid(HIVE)}")
        wait_until(lambda: host.state(TINY) == "inactive", "the workers to end", LEASE_S + 60)
    finally:
        host.machine.console("mv /var/tmp/hive.yaml /etc/rbee/hive.yaml")
    host.reported("tiny", WorkerState.READY)


def test_the_target_stops_and_starts_everything(host: Host) -> None:
    host.machine.console("systemctl stop rbee.target")
    units = (TINY, OTHER, HIVE, "rbee-worker@tiny.socket")
    assert {host.state(unit) for unit in units} == {"inactive"}
    host.machine.console("systemctl start rbee.target")
    host.reported("tiny", WorkerState.READY)


def test_everything_starts_at_boot(host: Host) -> None:
    host.machine.reboot()
    for name in ("tiny", "other"):
        host.reported(name, WorkerState.READY)
    assert host.machine.failed_units() == []


def test_a_worker_that_dies_is_reported_and_started_again(host: Host) -> None:
    pid = host.pid(TINY)
    host.machine.console(f"kill -9 {pid}")
    assert "signal 9" in host.reported("tiny", WorkerState.FAILED).reason
    assert host.reported("tiny", WorkerState.READY).pid != pid


def test_a_stopped_worker_is_left_stopped(host: Host) -> None:
    host.machine.console(f"systemctl stop {TINY}")
    assert "systemctl start" in host.reported("tiny", WorkerState.STOPPED).reason
    host.machine.console(f"systemctl restart {OTHER}")
    host.reported("other", WorkerState.READY)
    assert host.state(TINY) == host.state("rbee-worker@tiny.socket") == "inactive"


def test_what_keeps_a_worker_from_starting_is_reported_with_the_reason(host: Host) -> None:
    port = FIRST_PORT + 7
    files = worker_files("broken", port, host.worker_token, path="/var/lib/rbee/models/missing.gguf")
    write(host.machine, files)
    host.machine.console("chown rbee: /etc/rbee/worker-tokens/broken; systemctl daemon-reload")
    host.machine.console("systemctl start rbee-worker@broken.service", check=False)
    assert "missing.gguf" in host.reported("broken", WorkerState.FAILED).reason
    host.machine.console("systemctl stop rbee-worker@broken.service")
    host.machine.console(f"systemd-run --unit=squatter python3 -m http.server {port}")
    wait_until(lambda: host.machine.console(f"ss -ltn | grep :{port}", check=False).returncode == 0, "the squatter")
    host.machine.console("systemctl start rbee-worker@broken.service", check=False)
    wait_until(
        lambda: f"port {port} is taken by another program" in host.workers()["broken"].reason, "the taken port's name"
    )
    assert host.workers()["broken"].state is WorkerState.FAILED
    host.machine.console(f"systemctl stop squatter; rm {' '.join(files)}; systemctl daemon-reload")
    wait_until(lambda: "broken" not in host.workers(), "a worker that is not declared any more to be forgotten")
