"""The faults that other tests in this folder inject do what they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from machines import Machine, RigProblem, faults, wait_until


def test_another_program_takes_a_port(machine: Machine) -> None:
    with faults.port_taken(machine, 7835) as unit:
        code = "import socket; socket.create_server(('', 7835))"
        assert "Address already in use" in machine.ssh(f'python3 -c "{code}"', check=False).stderr
        assert machine.ssh(f"systemctl is-active {unit}").stdout.strip() == "active"
    assert not faults.listens(machine, 7835)


@pytest.mark.parametrize(("offset", "damaged"), [(0, "`bcdef"), (-1, "abcdeg"), (2, "abbdef")])
def test_a_flipped_bit_shows_in_the_content_only(machine: Machine, offset: int, damaged: str) -> None:
    machine.ssh("printf abcdef > /root/model; touch -d '2001-02-03' /root/model")
    before = machine.ssh("stat -c '%s %y' /root/model").stdout
    faults.flip_bit(machine, "/root/model", offset)
    assert machine.ssh("cat /root/model").stdout == damaged
    assert machine.ssh("stat -c '%s %y' /root/model").stdout == before


def test_a_file_cut_short(machine: Machine) -> None:
    machine.ssh("printf abcdef > '/root/a model'")
    faults.cut_short(machine, "/root/a model", 2)
    assert machine.ssh("cat '/root/a model'").stdout == "ab"


def test_a_host_without_python(fresh_machine: Machine) -> None:
    faults.remove_python(fresh_machine)
    assert fresh_machine.ssh("python3 -V", check=False).returncode == 127
    assert fresh_machine.failed_units() == []


def test_a_unit_is_killed_or_stopped_by_signal(machine: Machine) -> None:
    machine.ssh("systemd-run --quiet --unit=victim sleep 1000")
    faults.signal_unit(machine, "victim.service", "STOP")
    state = "ps -o state= -p $(systemctl show -P MainPID victim)"
    wait_until(lambda: machine.ssh(state).stdout.strip() == "T", "the unit to stand still")
    faults.signal_unit(machine, "victim.service", "KILL")
    wait_until(lambda: machine.failed_units() == ["victim.service"], "the unit to be failed")
    machine.ssh("systemctl reset-failed victim")


def test_a_read_only_folder(machine: Machine) -> None:
    with faults.read_only(machine, "/root"), pytest.raises(RigProblem, match="Read-only file system"):
        machine.ssh("touch /root/new")
    machine.ssh("touch /root/new")


def test_a_starved_unit_is_killed_by_the_kernel(machines: Callable[[int], list[Machine]]) -> None:
    [machine] = machines(1)
    eat = "import sys; sys.stdin.readline(); kept = bytearray(256 << 20); sys.stdin.readline()"
    machine.ssh("mkfifo /root/go")
    machine.ssh(f"systemd-run --quiet --unit=eater sh -c \"exec python3 -c '{eat}' <> /root/go\"")
    wait_until(lambda: "python3" in machine.ssh("systemctl status eater").stdout, "the unit to run")
    faults.starve(machine, "eater.service", 64 << 20)
    machine.ssh("echo > /root/go")
    wait_until(lambda: machine.failed_units() == ["eater.service"], "the unit to be killed")
    assert "KILL" in machine.journal("eater") or "oom" in machine.journal("eater")
