"""What goes wrong on a machine itself: other programs, damaged files, dying and starving services.

Faults of its link, its disk's room and its power are methods of Machine.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator

from . import nspawn
from .commands import wait_until
from .machine import Machine

LISTEN = "import signal, socket; kept = socket.create_server(('0.0.0.0', {port})); signal.pause()"
FLIP = """
import os, sys
path, offset = sys.argv[1], int(sys.argv[2])
times = os.stat(path)
with open(path, 'r+b') as file:
    file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
    byte = file.read(1)[0]
    file.seek(-1, os.SEEK_CUR)
    file.write(bytes([byte ^ 1]))
os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
"""


@contextlib.contextmanager
def port_taken(machine: Machine, port: int) -> Iterator[str]:
    """Let another program of the machine listen on a TCP port; yields the name of its unit."""
    unit = f"other-program-{port}"
    program = shlex.join(["python3", "-c", LISTEN.format(port=port)])
    machine.console(f"systemd-run --quiet --collect --unit={unit} {program}")
    wait_until(lambda: listens(machine, port), f"{unit} to listen on {machine.name}")
    try:
        yield unit
    finally:
        machine.console(f"systemctl stop {unit}", check=False)


def listens(machine: Machine, port: int) -> bool:
    """Tell whether anything listens on a TCP port of the machine."""
    return machine.console(f"ss -Hltn 'sport = :{port}'").stdout != ""


def flip_bit(machine: Machine, path: str, offset: int = -1) -> None:
    """Change a bit of the byte at `offset`, from the end when negative; size and times stay, as when disks rot."""
    machine.console(shlex.join(["python3", "-c", FLIP, path, str(offset)]))


def cut_short(machine: Machine, path: str, keep_bytes: int) -> None:
    """Keep only the beginning of a file, as an interrupted copy does."""
    machine.console(f"truncate --size={keep_bytes} {shlex.quote(path)}")


def remove_python(machine: Machine) -> None:
    """Take python3 away, as on a host that never had it."""
    machine.console("rm /usr/bin/python3 /usr/bin/python3.*")


def signal_unit(machine: Machine, unit: str, name: str) -> None:
    """Send a signal (`KILL`, `STOP`, `CONT`, ...) to the main process of a unit."""
    machine.console(f"systemctl kill --kill-whom=main --signal={name} {shlex.quote(unit)}")


@contextlib.contextmanager
def read_only(machine: Machine, folder: str) -> Iterator[None]:
    """Let a folder be read-only for every program that starts meanwhile."""
    where = shlex.quote(folder)
    machine.console(f"mount --bind {where} {where} && mount -o remount,bind,ro {where}")
    try:
        yield
    finally:
        machine.console(f"umount {where}", check=False)


def starve(machine: Machine, unit: str, memory_bytes: int) -> None:
    """Let the kernel kill what a running unit has beyond this much memory.

    systemd inside cannot limit memory where the controller's cgroups are version 1, so there it is done from outside.
    """
    outside = nspawn.memory_group(machine.namespace)
    if outside is None:
        machine.console(f"systemctl set-property --runtime {unit} MemoryMax={memory_bytes}")
        return
    group = outside / unit
    group.mkdir(exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(str(memory_bytes))
    for pid in nspawn.members_of_unit(machine.namespace, unit):
        (group / "cgroup.procs").write_text(str(pid))
