"""What goes wrong on machines, and what an apply makes of it: it says what and where, and the next one converges."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleets import DEMO, Fleet, hang_up, process_id, worker_state
from machines import Machine, Rig
from machines.commands import wait_until
from machines.faults import port_taken, remove_python

Boot = Callable[[int], list[Machine]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the controller's home, whose packages all tests share."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def served(rig: Rig, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Return a machine with a hive and a worker."""
    with rig.machines(1) as machines:
        fleet = Fleet(tmp_path_factory.mktemp("served") / "inventory", home, machines)
        fleet.write(**{machines[0].name: [DEMO]}).apply()
        yield fleet


@pytest.fixture
def fleet(served: Fleet) -> Iterator[Fleet]:
    """Return that machine's fleet, as a test finds and leaves it."""
    yield served
    [machine] = served.machines
    machine.heal()
    served.user = "root"
    served.write(**{machine.name: [DEMO]}).apply()


# The way there


def test_an_unknown_host_key_is_refused_with_the_command_that_trusts_it(fleet: Fleet) -> None:
    (fleet.folder / "known_hosts").write_text("")
    hang_up(fleet)
    done = fleet.apply(code=3)
    assert f"rbee hosts trust {fleet.machines[0].name}" in done.stdout + done.stderr


def test_a_changed_host_key_is_refused_by_name(fleet: Fleet) -> None:
    [machine] = fleet.machines
    key = (fleet.folder / "known_hosts").read_text()
    machine.change_host_key()
    hang_up(fleet)
    assert (fleet.folder / "known_hosts").read_text() == key
    done = fleet.apply(code=3)
    assert f"{machine.name}: failed: its host key is not the one that was pinned" in done.stdout
    assert f"rbee hosts forget {machine.name}" in done.stdout


def test_a_key_that_the_host_does_not_know_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    text = (fleet.folder / "fleet.conf").read_text()
    (fleet.folder / "fleet.conf").write_text(text.replace(str(fleet.machines[0].key), str(tmp_path / "key")))
    hang_up(fleet)
    done = fleet.apply(code=3)
    assert "it does not accept this key or user" in done.stdout
    assert "fleet.conf:" in done.stdout


def test_a_sudo_that_asks_for_a_password_is_an_error_and_no_wait(fleet: Fleet) -> None:
    fleet.user = "walled"
    fleet.write(**{fleet.machines[0].name: [DEMO]})
    done = fleet.apply(code=3)
    assert "sudo asks for a password" in done.stdout
    assert "NOPASSWD" in done.stdout


def test_a_user_with_sudo_converges_as_root_does(fleet: Fleet) -> None:
    fleet.user = "deploy"
    fleet.write(**{fleet.machines[0].name: [f"{DEMO} slots=2"]})
    fleet.apply()
    assert "0 to change" in fleet.apply().stdout


def test_a_host_name_is_never_an_option(fleet: Fleet, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    text = (fleet.folder / "fleet.conf").read_text()
    name = f"-oProxyCommand=touch${{IFS}}{proof}"
    (fleet.folder / "fleet.conf").write_text(text.replace(f"Host {fleet.machines[0].name}", f"Host {name}"))
    done = fleet.apply(code=1)
    assert "fleet.conf:3" in done.stderr
    assert not proof.exists()


def test_a_host_without_python_is_told_what_to_install(rig: Rig, home: Path, tmp_path: Path) -> None:
    with rig.machines(1) as machines:
        remove_python(machines[0])
        fleet = Fleet(tmp_path / "inventory", home, machines).write(**{machines[0].name: [DEMO]})
        done = fleet.apply(code=3)
        assert "there is no python3" in done.stdout
        assert "apt-get install python3" in done.stdout
        machines[0].console(
            "printf '#!/bin/sh\\necho python 3.9.2 >&2; exit 43\\n' > /usr/bin/python3; chmod +x /usr/bin/python3"
        )
        assert "rbee needs 3.11 or later" in fleet.apply(code=3).stdout


def test_a_host_that_swallows_packets_holds_up_no_other(rig: Rig, home: Path, tmp_path: Path) -> None:
    with rig.machines(2) as machines:
        dark, bright = machines
        fleet = Fleet(tmp_path / "inventory", home, machines).write(**{dark.name: [DEMO], bright.name: [DEMO]})
        dark.blackhole()
        outcomes = fleet.outcomes()
        assert outcomes[dark.name]["state"] == "unreachable"
        assert outcomes[bright.name]["state"] == "converged"
        dark.heal()
        fleet.apply()
        # A connection that is open, and a host that stops answering on it.
        fleet.write(**{dark.name: [f"{DEMO} slots=2"], bright.name: [f"{DEMO} slots=2"]})
        assert fleet.plan().returncode == 2
        dark.blackhole()
        outcomes = fleet.outcomes()
        assert outcomes[dark.name]["state"] == "unreachable"
        assert outcomes[bright.name]["state"] == "converged"
        dark.heal()
        fleet.apply()


# On the host


def test_a_full_disk_in_the_middle_of_a_copy_leaves_no_trace(rig: Rig, home: Path, tmp_path: Path) -> None:
    with rig.machines(1) as machines:
        [machine] = machines
        fleet = Fleet(tmp_path / "inventory", home, machines).write(**{machine.name: [DEMO]})
        machine.fill_disk(leave_bytes=60_000_000)
        refused = fleet.apply(code=3)
        assert "MB free" in refused.stdout
        machine.free_disk()
        # Enough when it is planned, and filled by somebody else while it is copied.
        machine.limit_rate(2_000_000)
        applying = subprocess.Popen(
            fleet.command("apply", str(fleet.folder), "--yes"), env=fleet.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        wait_until(
            lambda: machine.console("ls -A /opt/rbee/layers 2>/dev/null", check=False).stdout != "", "a copy to begin"
        )
        machine.fill_disk()
        said, _ = applying.communicate(timeout=120)
        assert applying.returncode == 3, said
        assert "No space left" in said
        assert "Traceback" not in said
        machine.free_disk()
        machine.heal()
        fleet.apply()
        assert worker_state(machine) == "active"


@pytest.mark.parametrize("name", ["KILL", "INT"])
def test_an_apply_that_is_ended_anywhere_is_finished_by_the_next(
    rig: Rig, home: Path, tmp_path: Path, name: str
) -> None:
    with rig.machines(1) as machines:
        fleet = Fleet(tmp_path / "inventory", home, machines).write(**{machines[0].name: [DEMO]})
        for lasting_s in (0.6, 1.2, 2.0, 2.8, 3.6, 4.4):
            applying = subprocess.Popen(
                fleet.command("apply", str(fleet.folder), "--yes"), env=fleet.environment(),
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
            time.sleep(lasting_s)  # the moment of the blow, not a wait for anything
            if applying.poll() is None:
                applying.send_signal(getattr(signal, f"SIG{name}"))
            _, said = applying.communicate(timeout=60)
            assert "Traceback" not in said
        fleet.apply()
        assert worker_state(machines[0]) == "active"
        assert "0 to add, 0 to change" in fleet.plan().stdout


def test_a_host_that_is_switched_off_converges_when_it_is_back(rig: Rig, home: Path, tmp_path: Path) -> None:
    with rig.machines(2) as machines:
        off, on = machines
        fleet = Fleet(tmp_path / "inventory", home, machines).write(**{on.name: [DEMO], off.name: [DEMO]})
        off.limit_rate(2_000_000)
        applying = subprocess.Popen(
            fleet.command("apply", str(fleet.folder), "--yes", "--json"), env=fleet.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        wait_until(
            lambda: off.console("ls -A /opt/rbee/layers 2>/dev/null", check=False).stdout != "", "a copy to begin"
        )
        off.power_off()
        said, _ = applying.communicate(timeout=120)
        outcomes = json.loads(said)["outcomes"]
        assert outcomes[off.name]["state"] == "unreachable"
        assert applying.returncode == 3
        off.power_on()
        fleet.apply()
        assert worker_state(off) == worker_state(on) == "active"


def test_a_second_apply_is_told_who_is_at_work(fleet: Fleet) -> None:
    [machine] = fleet.machines
    holding = subprocess.Popen(
        ["ssh", "-F", str(machine.folder / "ssh_config"), f"root@{machine.name}",
         "flock /run/rbee.lock sh -c 'echo somebody > /run/rbee.lock; echo held; cat'"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holding.stdout
        assert holding.stdout.readline() == "held\n"
        done = fleet.apply(code=3)
        assert f"{machine.name}: failed: another apply is at work on it (somebody" in done.stdout
        assert fleet.plan().returncode == 0
    finally:
        holding.communicate("", timeout=30)
    fleet.apply()


def test_a_port_that_another_program_has_is_told_before_anything_is_changed(fleet: Fleet) -> None:
    [machine] = fleet.machines
    with port_taken(machine, 8002):
        fleet.write(**{machine.name: [DEMO, "Worker two model=rbee-demo port=8002"]})
        done = fleet.apply(code=3)
        assert "port 8002, which two should have, is taken by another program" in done.stdout
        assert "two" not in machine.console("ls /etc/rbee/workers").stdout
    fleet.apply()
    assert worker_state(machine, "two") == "active"


def test_a_model_with_another_sha256_is_refused_and_names_the_line(fleet: Fleet, tmp_path: Path) -> None:
    [machine] = fleet.machines
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(2000))
    wrong = f"Model m source=file:{tmp_path}/m.gguf sha256={'0' * 64}"
    fleet.write(**{machine.name: [DEMO, wrong, "Worker m model=m"]})
    done = fleet.apply(code=3)
    assert re.search(r"fleet\.conf:\d+ says 000000", done.stdout)
    assert machine.console("ls /var/lib/rbee/models").stdout == ""


def test_a_worker_that_never_becomes_ready_gets_its_previous_form_back(fleet: Fleet, tmp_path: Path) -> None:
    [machine] = fleet.machines
    before = machine.console("cat /etc/rbee/workers/demo.yaml").stdout
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(2000))
    broken = f"Model broken source=file:{tmp_path}/broken.gguf"
    fleet.write(**{machine.name: [broken, "Worker demo model=broken"]})
    done = fleet.apply(code=3)
    assert "its previous form runs again" in done.stdout
    assert worker_state(machine) == "active"
    assert machine.console("cat /etc/rbee/workers/demo.yaml").stdout == before
    fleet.write(**{machine.name: [DEMO, broken, "Worker fresh model=broken"]})
    done = fleet.apply(code=3)
    assert "it had no previous form" in done.stdout
    assert "fresh" not in machine.console("ls /etc/rbee/workers /etc/systemd/system").stdout


def test_an_inventory_emptied_by_mistake_removes_nothing(fleet: Fleet) -> None:
    [machine] = fleet.machines
    running = process_id(machine, "rbee-worker@demo.service")
    (fleet.folder / "fleet.conf").write_text("")
    fleet.apply(code=1)
    text = "Host *\n    Worker demo model=\n"
    (fleet.folder / "fleet.conf").write_text(text)
    refused = fleet.apply(code=1)
    assert "fleet.conf:2" in refused.stderr
    assert process_id(machine, "rbee-worker@demo.service") == running


def test_a_release_whose_hive_does_not_start_is_taken_back(fleet: Fleet) -> None:
    [machine] = fleet.machines
    fresh = machine.console("basename $(readlink /opt/rbee/current)").stdout.strip()
    machine.console(
        f"cp -a /opt/rbee/releases/{fresh} /opt/rbee/releases/0ld && ln -sfn releases/0ld /opt/rbee/current"
    )
    program = f"/opt/rbee/releases/{fresh}/bin/rbee-python"
    machine.console(f"cp -L {program} /root/kept && rm {program} && printf '#!/bin/sh\nexit 1\n' > {program}")
    machine.console(f"chmod +x {program}")
    done = fleet.apply(code=3)
    assert "rbee-hive.service did not become ready" in done.stdout
    assert machine.console("readlink /opt/rbee/current").stdout == "releases/0ld\n"
    assert machine.console("systemctl is-active rbee-hive").stdout == "active\n"
    machine.console(f"cp /root/kept {program}")
    fleet.apply()
    assert machine.console("readlink /opt/rbee/current").stdout == f"releases/{fresh}\n"
