"""Bare machines become a fleet, stay one, and change only where the inventory changed."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleets import DEMO, Fleet, process_id, worker_state
from machines import Machine, Rig
from machines.commands import wait_until

from rbee.testing.models import write_random_gguf

CHAT = {"model": "rbee-demo", "messages": [{"role": "user", "content": "What is a hive?"}]}


@pytest.fixture(scope="module")
def fleet(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Return two machines, of which the first has the queen, brought up by a first apply."""
    folder = tmp_path_factory.mktemp("fleet")
    with rig.machines(2) as machines:
        made = Fleet(folder / "inventory", folder / "home", machines)
        usual(made).apply()
        yield made


def usual(fleet: Fleet) -> Fleet:
    first, second = (machine.name for machine in fleet.machines)
    return fleet.write(**{first: ["QueenPort 7833", DEMO], second: [DEMO]})


@pytest.fixture
def hosts(fleet: Fleet) -> Iterator[tuple[Machine, Machine]]:
    """Return both machines; the test leaves them as the usual inventory says."""
    yield fleet.machines[0], fleet.machines[1]
    usual(fleet).apply()


def chat(queen: Machine, body: dict[str, Any]) -> dict[str, Any]:
    command = f"curl -sS -m 60 http://127.0.0.1:7833/v1/chat/completions -d '{json.dumps(body)}'"
    answer: dict[str, Any] = json.loads(queen.console(command).stdout)
    return answer


def test_a_bare_host_serves_and_the_second_apply_changes_nothing(fleet: Fleet, hosts: tuple[Machine, Machine]) -> None:
    before = {m.name: process_id(m, "rbee-worker@demo.service") for m in hosts}
    again = fleet.apply()
    assert "0 to add, 0 to change, 0 to remove" in again.stdout
    assert before == {m.name: process_id(m, "rbee-worker@demo.service") for m in hosts}
    assert fleet.plan().returncode == 0


def test_a_stream_comes_from_a_worker_on_another_host(fleet: Fleet, hosts: tuple[Machine, Machine]) -> None:
    queen, other = hosts
    fleet.write(**{queen.name: ["QueenPort 7833"], other.name: [DEMO]})
    fleet.apply()
    body = json.dumps({**CHAT, "stream": True})
    said = queen.console(f"curl -sSN -m 60 -D - http://127.0.0.1:7833/v1/chat/completions -d '{body}'").stdout
    assert f"x-rbee-worker: {other.name}/demo" in said
    assert said.rstrip().endswith("data: [DONE]")


def test_a_changed_value_restarts_that_worker_alone_and_the_plan_shows_it(
    fleet: Fleet, hosts: tuple[Machine, Machine]
) -> None:
    queen, other = hosts
    kept = process_id(queen, "rbee-worker@demo.service"), process_id(other, "rbee-hive.service")
    fleet.write(**{queen.name: ["QueenPort 7833", DEMO], other.name: [f"{DEMO} slots=2"]})
    plan = fleet.plan()
    assert plan.returncode == 2
    assert "~ worker demo" in plan.stdout
    assert "+slots: 2" in plan.stdout
    assert "0 to add" in plan.stdout
    fleet.apply()
    assert kept == (process_id(queen, "rbee-worker@demo.service"), process_id(other, "rbee-hive.service"))


def test_a_removed_line_removes_the_worker(fleet: Fleet, hosts: tuple[Machine, Machine]) -> None:
    queen, other = hosts
    fleet.write(**{queen.name: ["QueenPort 7833", DEMO], other.name: []})
    assert "- worker demo" in fleet.plan().stdout
    fleet.apply()
    assert worker_state(other) == "inactive"
    left = other.console("ls /etc/systemd/system /etc/rbee/workers /etc/rbee/worker-tokens").stdout
    assert "demo" not in left
    assert chat(queen, CHAT)["choices"][0]["message"]["content"]


def test_a_running_answer_is_finished_before_its_worker_restarts(
    fleet: Fleet, hosts: tuple[Machine, Machine], tmp_path: Path
) -> None:
    queen, other = hosts
    file = write_random_gguf(tmp_path / "slow.gguf", 27_000_000)
    slow = [f"Model slow source=file:{file}", "Worker slow model=slow"]
    fleet.write(**{queen.name: ["QueenPort 7833", DEMO], other.name: [DEMO, *slow]})
    fleet.apply()
    answers: list[str] = []
    long = json.dumps({**CHAT, "model": "slow", "stream": True, "max_tokens": 600})
    ask = f"curl -sSN -m 100 http://127.0.0.1:7833/v1/chat/completions -d '{long}'"
    streams = [threading.Thread(target=lambda: answers.append(queen.console(ask).stdout)) for _ in range(3)]
    for stream in streams:
        stream.start()
    wait_until(lambda: busy(other) == 3, "three answers to run")
    slow[1] += " slots=3"
    fleet.write(**{queen.name: ["QueenPort 7833", DEMO], other.name: [DEMO, *slow]})
    applied = fleet.apply()
    for stream in streams:
        stream.join()
    assert re.search(r"drained first: \d running job", applied.stdout)
    assert "worker slow is draining" in applied.stderr
    assert [answer.rstrip().endswith("data: [DONE]") for answer in answers] == [True] * 3, answers


def busy(machine: Machine) -> int:
    """Return how many jobs the worker `slow` of a machine runs."""
    health = machine.console("curl -sk -m 10 https://127.0.0.1:8002/health").stdout
    return int(json.loads(health)["in_flight"])


def test_what_was_done_by_hand_is_drift_and_is_repaired(fleet: Fleet, hosts: tuple[Machine, Machine]) -> None:
    _, other = hosts
    other.console("systemctl stop rbee-worker@demo.service rbee-worker@demo.socket")
    other.console("echo '# mine' >> /etc/systemd/system/rbee-hive.service")
    other.console("echo 'left: over' > /etc/rbee/workers/ghost.yaml")
    drift = fleet.rbee("drift", str(fleet.folder))
    assert drift.returncode == 2
    for words in ("it is stopped", "rbee-hive.service differs", "-# mine", "ghost.yaml"):
        assert words in drift.stdout
    fleet.apply()
    assert worker_state(other) == "active"
    assert fleet.rbee("drift", str(fleet.folder)).returncode == 0


def test_nothing_outside_of_rbees_own_is_touched(fleet: Fleet, hosts: tuple[Machine, Machine]) -> None:
    _, other = hosts
    other.console("printf '[Service]\\nExecStart=/bin/true\\n' > /etc/systemd/system/rbee-like.service")
    other.console("mkdir -p /etc/rbee/mine && echo x > /etc/rbee/mine/x")
    fleet.apply()
    fleet.write(**{fleet.machines[0].name: ["QueenPort 7833", DEMO], other.name: []})
    fleet.apply()
    assert other.console("cat /etc/systemd/system/rbee-like.service /etc/rbee/mine/x").stdout.endswith("x\n")
    other.console("rm -r /etc/systemd/system/rbee-like.service /etc/rbee/mine")


def test_units_are_confined(fleet: Fleet, hosts: tuple[Machine, Machine]) -> None:
    queen, _ = hosts
    shown = queen.console("systemd-analyze security --no-pager --json=short").stdout
    scores = {unit["unit"]: float(unit["exposure"]) for unit in json.loads(shown)}
    assert scores["rbee-worker@demo.service"] <= 1.5
    assert scores["rbee-hive.service"] <= 3
    assert scores["rbee-queen.service"] <= 3


def test_half_of_the_workers_go_only_when_that_is_said(fleet: Fleet, hosts: tuple[Machine, Machine]) -> None:
    queen, other = hosts
    fleet.write(**{queen.name: ["QueenPort 7833", DEMO], other.name: [DEMO, "Worker two model=rbee-demo"]})
    fleet.apply()
    fleet.write(**{queen.name: ["QueenPort 7833", DEMO], other.name: []})
    refused = fleet.apply(code=1)
    assert "--yes-prune" in refused.stderr
    assert worker_state(other, "two") == "active"
    fleet.apply("--yes-prune")
    assert worker_state(other, "two") == "inactive"


def test_a_saved_plan_is_refused_when_the_host_has_moved(
    fleet: Fleet, hosts: tuple[Machine, Machine], tmp_path: Path
) -> None:
    queen, other = hosts
    fleet.write(**{queen.name: ["QueenPort 7833", DEMO], other.name: [f"{DEMO} slots=2"]})
    saved = tmp_path / "plan"
    assert fleet.plan("--out", str(saved)).returncode == 2
    other.console("systemctl stop rbee-worker@demo.service")
    moved = fleet.apply("--plan", str(saved), code=1)
    assert f"{other.name}: it has changed since the plan was saved" in moved.stderr
    assert fleet.plan("--out", str(saved)).returncode == 2
    fleet.apply("--plan", str(saved))


def test_a_model_file_is_placed_checked_and_copied_from_the_other_host(
    fleet: Fleet, hosts: tuple[Machine, Machine], tmp_path: Path
) -> None:
    from importlib import resources

    queen, other = hosts
    file = tmp_path / "small.gguf"
    file.write_bytes((resources.files("rbee") / "models" / "rbee-demo.gguf").read_bytes())
    model = [f"Model small source=file:{file}", "Worker small model=small"]
    fleet.write(**{queen.name: ["QueenPort 7833", DEMO], other.name: [DEMO, *model]})
    fleet.apply()
    sha256 = other.console("sha256sum /var/lib/rbee/models/small.gguf").stdout.split()[0]
    file.unlink()
    model[0] += f" sha256={sha256}"
    fleet.write(**{queen.name: ["QueenPort 7833", DEMO, *model], other.name: [DEMO, *model]})
    assert f"from host {other.name}" in fleet.plan().stdout
    fleet.apply()
    assert chat(queen, {**CHAT, "model": "small"})["model"] == "small"


def test_an_upgrade_restarts_no_worker(fleet: Fleet, hosts: tuple[Machine, Machine]) -> None:
    _, other = hosts
    kept = {m.name: process_id(m, "rbee-worker@demo.service") for m in hosts}
    hive = process_id(other, "rbee-hive.service")
    # What a release before this one leaves: another name behind `current`.
    for machine in hosts:
        machine.console("cd /opt/rbee/releases && cp -a $(readlink /opt/rbee/current | xargs basename) 0ld")
        machine.console("ln -sfn releases/0ld /opt/rbee/current")
    assert "a new release" in fleet.plan().stdout
    fleet.apply()
    assert {m.name: process_id(m, "rbee-worker@demo.service") for m in hosts} == kept
    assert process_id(other, "rbee-hive.service") != hive


def test_the_plan_masks_secrets(fleet: Fleet, hosts: tuple[Machine, Machine]) -> None:
    _, other = hosts
    other.console("echo stolen > /etc/rbee/secrets/hive-token")
    plan = fleet.plan()
    assert "@@ a secret @@" in plan.stdout
    assert "stolen" not in plan.stdout
