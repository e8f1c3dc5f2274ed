"""A set of machines on one network, which leaves nothing behind."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from . import network
from .base_tree import search_path
from .commands import run
from .machine import Machine
from .network import Network
from .sweep import RUN, hold, sweep, sweep_dead, unmount_below

DISK_BYTES = 4 << 30

# What the rig's own ssh goes by; nothing of the person's ~/.ssh takes part.
SSH_CONFIG = """\
Host {name}
    HostName {address}
    IdentityFile {key}
    IdentitiesOnly yes
    BatchMode yes
    UserKnownHostsFile {folder}/rig_known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    ControlMaster auto
    ControlPath {folder}/mux-%r
    ControlPersist yes
    ConnectTimeout 5
    ServerAliveInterval 5
    LogLevel ERROR
"""


@dataclass
class Rig:
    """Machines that reach each other and the controller, and nothing else."""

    base: Path
    state: Path
    network: Network
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @contextlib.contextmanager
    def machines(self, count: int, *, disk_bytes: int = DISK_BYTES) -> Iterator[list[Machine]]:
        """Boot this many machines side by side; their power is cut and their disks are gone at the end."""
        made = [self.make(disk_bytes) for _ in range(count)]
        try:
            with ThreadPoolExecutor(max_workers=count) as pool:
                list(pool.map(Machine.power_on, made))
            yield made
        finally:
            for machine in made:
                self.discard(machine)

    def make(self, disk_bytes: int) -> Machine:
        """Prepare a machine that is off: its disk, its host key, and how to reach it."""
        number = next(self.numbers)
        name, address, key = f"h{number}", self.network.address(number), self.state / "key"
        folder = self.state / name
        folder.mkdir()
        machine = Machine(name, address, f"rb{self.state.name}{number}", folder, key, self.network)
        machine.disk.mount(self.base, disk_bytes)
        machine.host_key = machine.disk.seed(name, address, key.with_suffix(".pub").read_text())
        (folder / "ssh_config").write_text(SSH_CONFIG.format(name=name, address=address, key=key, folder=folder))
        for file in ("known_hosts", "rig_known_hosts"):
            (folder / file).write_text(f"{machine.known_hosts_line()}\n")
        return machine

    def discard(self, machine: Machine) -> None:
        """Cut its power and remove its disk."""
        machine.power_off()
        unmount_below(machine.folder)
        shutil.rmtree(machine.folder)

    def write_inventory(self, folder: Path, machines: Sequence[Machine], *lines: str, user: str = "root") -> Path:
        """Write `hosts.conf` with a block a machine, each with the same further `lines`, and return the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts.conf").write_text("\n".join(machine.host_block(*lines, user=user) for machine in machines))
        return folder


@contextlib.contextmanager
def started_rig(base: Path) -> Iterator[Rig]:
    """Make a network and a key for machines over this base tree, and remove everything at the end.

    A process of its own waits beside, and sweeps when this one is killed.
    """
    RUN.mkdir(exist_ok=True, mode=0o755)
    os.environ["PATH"] = search_path()
    with contextlib.ExitStack() as stack:
        # One rig at a time: a folder that nobody holds yet looks dead, and a free subnet is free for one.
        with (RUN / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            sweep_dead()
            state = new_state()
            stack.enter_context(hold(state))
            stack.enter_context(swept_if_killed(state))
            stack.callback(sweep, state)
            made = network.create(f"rb{state.name}")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "rbee-tests", "-f", str(state / "key"))
        yield Rig(base, state, made)


def new_state() -> Path:
    """Make a folder for one rig; its name, the process and a letter, is in every name on the controller."""
    for letter in "abcdefghijklmnopqrstuvwxyz":
        with contextlib.suppress(FileExistsError):
            state = RUN / f"{os.getpid()}{letter}"
            state.mkdir()
            return state
    raise RuntimeError("26 rigs in one process")


@contextlib.contextmanager
def swept_if_killed(state: Path) -> Iterator[None]:
    """Keep a process that sweeps as soon as this one ends without doing so itself."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    program = [sys.executable, "-c", f"from {__package__}.sweep import main; main()", str(state)]
    watcher = subprocess.Popen(program, stdin=subprocess.PIPE, env=environment, start_new_session=True)
    assert watcher.stdin
    try:
        yield
    finally:
        watcher.stdin.close()
        watcher.wait()
