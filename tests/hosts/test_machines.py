"""The machines that the other tests in this folder stand on are what they claim to be, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from machines import Machine, Rig, RigProblem, started_rig, wait_until
from machines.base_tree import addresses
from machines.sweep import titles

HERE = Path(__file__).parent
SHORT_S = 2


def connects(machine: Machine, address: str, port: int) -> bool:
    """Tell whether a program on the machine gets a TCP connection within a moment."""
    code = f"import socket; socket.create_connection(('{address}', {port}), timeout={SHORT_S})"
    return machine.console(f'python3 -c "{code}"', check=False).returncode == 0


@pytest.fixture
def listening(rig: Rig) -> Iterator[int]:
    """Return the port of a listener on the controller."""
    with socket.create_server((rig.network.controller, 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def healed(machine: Machine) -> Iterator[Machine]:
    """Return the module's machine, whose faults end with the test."""
    yield machine
    machine.thaw()
    machine.heal()
    machine.free_disk()


def test_it_is_a_healthy_host_with_only_sshd_and_python(machine: Machine) -> None:
    assert machine.ssh("systemctl is-system-running").stdout.strip() == "running"
    assert machine.failed_units() == []
    assert machine.ssh("python3 -c 'import sys; print(sys.version_info >= (3, 11))'").stdout.strip() == "True"
    for absent in ("python3 -m pip", "python3 -m venv /tmp/v", "ls /usr/lib/*/libgomp.so.1"):
        assert machine.ssh(absent, check=False).returncode != 0


def test_machines_differ_where_machines_differ(machines: Callable[[int], list[Machine]]) -> None:
    one, two = machines(2)
    for command in ("cat /etc/machine-id", "hostname", "cat /etc/ssh/ssh_host_*.pub"):
        assert one.ssh(command).stdout != two.ssh(command).stdout
    assert one.ssh("hostname").stdout.strip() == one.name
    one.ssh("touch /root/only-here")
    assert two.ssh("test -e /root/only-here", check=False).returncode == 1


def test_they_reach_each_other_and_the_controller_and_nothing_else(
    rig: Rig, machines: Callable[[int], list[Machine]], listening: int
) -> None:
    one, two = machines(2)
    assert connects(one, two.address, 22)
    assert connects(two, one.address, 22)
    assert connects(one, rig.network.controller, listening)
    for away in ("198.51.100.1", "2001:db8::1"):
        assert "unreachable" in one.ssh(f"ip route get {away}", check=False).stderr


def test_sudo_of_each_user(machine: Machine) -> None:
    assert machine.ssh("id -u").stdout.strip() == "0"
    assert machine.ssh("sudo -n id -u", user="deploy").stdout.strip() == "0"
    asked = machine.ssh("sudo -n id -u", user="walled", check=False)
    assert asked.returncode == 1
    assert "password is required" in asked.stderr
    assert machine.ssh("sudo -S id -u", user="walled", stdin="walled\n").stdout.strip() == "0"


@pytest.mark.parametrize("user", ["root", "deploy", "walled"])
def test_an_inventory_of_it_works_with_plain_ssh(rig: Rig, machine: Machine, tmp_path: Path, user: str) -> None:
    folder = rig.write_inventory(tmp_path / "inventory", [machine], user=user)
    plain = ["ssh", "-F", str(folder / "hosts.conf"), "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes"]
    done = subprocess.run([*plain, machine.name, "id -un"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == user


def test_a_changed_host_key_is_one_that_ssh_refuses(rig: Rig, fresh_machine: Machine, tmp_path: Path) -> None:
    folder = rig.write_inventory(tmp_path / "inventory", [fresh_machine])
    plain = ["ssh", "-F", str(folder / "hosts.conf"), "-o", "BatchMode=yes", fresh_machine.name, "true"]
    assert subprocess.run(plain, timeout=60, check=False).returncode == 0
    fresh_machine.change_host_key()
    refused = subprocess.run(plain, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 255
    assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in refused.stderr
    assert fresh_machine.ssh("hostname").stdout.strip() == fresh_machine.name


def test_a_black_hole_swallows_and_heals(rig: Rig, healed: Machine, listening: int) -> None:
    with socket.create_connection((healed.address, 22), timeout=60):
        healed.blackhole()
        with pytest.raises(TimeoutError):
            socket.create_connection((healed.address, 22), timeout=SHORT_S)
        assert not connects(healed, rig.network.controller, listening)
    healed.heal()
    assert healed.ssh("echo back").stdout.strip() == "back"


def test_a_black_hole_to_one_peer_only(rig: Rig, machines: Callable[[int], list[Machine]]) -> None:
    one, two = machines(2)
    one.blackhole(peer=two.address)
    assert not connects(one, two.address, 22)
    assert not connects(two, one.address, 22)
    socket.create_connection((one.address, 22), timeout=60).close()
    one.heal()
    assert connects(two, one.address, 22)


def test_a_one_way_black_hole_lets_packets_out(rig: Rig, healed: Machine) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inbox:
        inbox.bind((rig.network.controller, 0))
        inbox.settimeout(60)
        healed.blackhole("in")
        with pytest.raises(TimeoutError):
            socket.create_connection((healed.address, 22), timeout=SHORT_S)
        code = f"import socket as s; u = s.socket(s.AF_INET, s.SOCK_DGRAM); u.sendto(b'out', {inbox.getsockname()})"
        healed.console(f'python3 -c "{code}"')
        assert inbox.recv(16) == b"out"


def test_a_lossy_link_loses_its_share(rig: Rig, healed: Machine) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inbox:
        inbox.bind((rig.network.controller, 0))
        healed.blackhole("out", peer=rig.network.controller, percent=50)
        sender = "import socket as s; u = s.socket(s.AF_INET, s.SOCK_DGRAM)"
        many = f"[u.sendto(b'x', {inbox.getsockname()}) for _ in range(400)]"
        healed.console(f'python3 -c "{sender}; {many}"')
        inbox.setblocking(False)
        arrived = 0
        with contextlib.suppress(BlockingIOError):
            while inbox.recv(16):
                arrived += 1
    assert 100 < arrived < 300


def test_a_reset_port_answers_with_a_reset(healed: Machine) -> None:
    healed.reset_connections(22)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((healed.address, 22), timeout=60)


def test_a_frozen_machine_accepts_and_says_nothing(healed: Machine) -> None:
    healed.freeze()
    with socket.create_connection((healed.address, 22), timeout=60) as link:
        link.settimeout(SHORT_S)
        with pytest.raises(TimeoutError):
            link.recv(1)
        healed.thaw()
        link.settimeout(60)
        assert link.recv(4) == b"SSH-"


def test_a_slow_link_is_slow(rig: Rig, healed: Machine) -> None:
    healed.limit_rate(1_000_000)
    begin = time.monotonic()
    assert len(healed.ssh("head -c 250000 /dev/zero | tr '\\0' x").stdout) == 250_000
    assert time.monotonic() - begin > 1.5, "2 Mbit at 1 Mbit/s take two seconds, less what the bucket held"


def test_power_off_says_no_goodbye_and_power_on_finds_the_files(fresh_machine: Machine) -> None:
    machine_id = fresh_machine.ssh("echo kept > /root/file; cat /etc/machine-id").stdout
    with socket.create_connection((fresh_machine.address, 22), timeout=60) as link:
        link.settimeout(SHORT_S)
        assert link.recv(256).startswith(b"SSH-")
        fresh_machine.power_off()
        assert not fresh_machine.is_on()
        with pytest.raises(TimeoutError):
            link.recv(1)
    fresh_machine.power_on()
    assert fresh_machine.ssh("cat /root/file /etc/machine-id").stdout == f"kept\n{machine_id}"
    assert fresh_machine.failed_units() == []


def test_a_reboot_is_clean_and_keeps_the_journal(fresh_machine: Machine) -> None:
    fresh_machine.ssh("systemd-run --unit=note --wait echo before the reboot")
    boot = fresh_machine.ssh("cat /proc/sys/kernel/random/boot_id").stdout
    fresh_machine.reboot()
    assert fresh_machine.ssh("cat /proc/sys/kernel/random/boot_id").stdout != boot
    assert "before the reboot" in fresh_machine.journal("note")
    assert "Shutting down" in fresh_machine.journal()


def test_a_full_disk_is_full_and_then_is_not(healed: Machine) -> None:
    healed.fill_disk(leave_bytes=1 << 20)
    full = healed.ssh("head -c 3000000 /dev/zero > /root/large", check=False)
    assert "No space left on device" in full.stderr
    healed.free_disk()
    assert healed.ssh("head -c 3000000 /dev/zero > /root/large; stat -c %s /root/large").stdout.strip() == "3000000"


def test_a_command_that_fails_says_where_and_how(machine: Machine) -> None:
    with pytest.raises(RigProblem, match=rf"{machine.name}: `ls /no/such` failed \(2\): .*No such file"):
        machine.ssh("ls /no/such")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (
            "sources.list",
            "# deb http://b.example/debian x\ndeb [arch=amd64 trusted=yes] http://a.example/debian/ s main\n",
        ),
        ("sources.list.d/0.sources", "URIs: http://node.example/node\n\nTypes: deb\nURIs: http://a.example/debian/\n"),
        ("sources.list.d/b.list", "deb http://cloud.example/apt x main\ndeb http://a.example/debian/ s main contrib\n"),
    ],
)
def test_the_mirror_is_the_one_that_apt_uses(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / file).write_text(text)
    assert list(addresses(tmp_path)) == ["http://a.example/debian/"]


def traces(pid: int) -> list[str]:
    """Return what a process's rigs have on the controller: links, namespaces, mounts, groups, files, processes."""
    places = ["/sys/class/net", "/run/netns", "/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"]
    places += ["/run/systemd/nspawn/propagate", "/run/rbee-tests"]
    entries = [path for place in places if Path(place).is_dir() for path in Path(place).iterdir()]
    found = [str(path) for path in entries if path.name.startswith((f"rb{pid}", str(pid)))]
    found += [line for line in Path("/proc/self/mounts").read_text().splitlines() if f"/run/rbee-tests/{pid}" in line]
    return found + [title for _, title in titles() if f"/run/rbee-tests/{pid}" in title or f"rb{pid}" in title]


def test_nothing_is_left_when_a_rig_ends(rig: Rig) -> None:
    before = traces(os.getpid())
    with started_rig(rig.base) as other, other.machines(2) as pair:
        assert other.network.subnet != rig.network.subnet
        pair[0].ssh("true", user="deploy")
        pair[1].freeze()
        during = traces(os.getpid())
    assert len(during) > len(before)
    assert traces(os.getpid()) == before


@contextlib.contextmanager
def person_with_a_machine() -> Iterator[subprocess.Popen[str]]:
    """Run `shell.py`, and yield it when a plain ssh has reached its machine."""
    program = [sys.executable, str(HERE / "shell.py"), "1"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as person:
        assert person.stdout
        words = dict(line.split()[:2] for line in iter(person.stdout.readline, "Ctrl+C takes them away.\n"))
        config = Path(words["inventory"], "hosts.conf")
        reached = subprocess.run(["ssh", "-F", config, "h1", "hostname"], capture_output=True, timeout=60, check=True)
        assert reached.stdout == b"h1\n"
        assert traces(person.pid)
        yield person
        person.wait(timeout=120)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_its_process_is_ended(rig: Rig, end: signal.Signals) -> None:
    with person_with_a_machine() as person:
        person.send_signal(end)
    wait_until(lambda: not traces(person.pid), f"no trace of process {person.pid}")


def test_a_later_rig_sweeps_what_a_dead_one_left_and_no_living_one(rig: Rig, machine: Machine) -> None:
    with person_with_a_machine() as person:
        watcher = next(pid for pid, title in titles() if "machines.sweep" in title and parent(pid) == person.pid)
        os.kill(watcher, signal.SIGKILL)
        person.kill()
    assert traces(person.pid)
    with started_rig(rig.base):
        assert not traces(person.pid)
    assert machine.ssh("hostname").stdout.strip() == machine.name


def parent(pid: int) -> int:
    """Return the process that started another."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
