"""One test machine: how it is reached, what can befall it, and its power switch."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from . import network, nspawn
from .commands import HANG_GUARD_S, RigProblem, wait_until
from .disk import Disk
from .network import Direction, Network


@dataclass(eq=False)
class Machine:
    """A Debian host with systemd, sshd and python3.

    `root` and `deploy` (sudo without a password) and `walled` (sudo asks for the password `walled`) let the rig's
    key in. `namespace` names its network namespace, link and control groups on the controller.
    """

    name: str
    address: str
    namespace: str
    folder: Path
    key: Path
    network: Network = field(repr=False)
    host_key: str = field(default="", repr=False)
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def disk(self) -> Disk:
        """Return its disk, which stays when the power goes."""
        return Disk(self.folder)

    @property
    def known_hosts(self) -> Path:
        """Return the file that vouches for it to its owner; `change_host_key` leaves it as it was."""
        return self.folder / "known_hosts"

    # Reach it

    def ssh(
        self, command: str, *, user: str = "root", stdin: str = "", timeout_s: float = HANG_GUARD_S, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command over SSH; RigProblem when it fails and `check` is set, or hangs."""
        line = ["ssh", "-F", str(self.folder / "ssh_config"), f"{user}@{self.name}", command]
        return self._run(line, stdin, timeout_s, check)

    def console(
        self, command: str, *, stdin: str = "", timeout_s: float = HANG_GUARD_S, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command as root past the network, as at a keyboard on the machine itself."""
        target = f"--target={nspawn.first_process(self.namespace)}"
        enter = ["nsenter", target, "--mount", "--uts", "--ipc", "--net", "--pid", "--root"]
        clean = [
            "env",
            "-i",
            "--chdir=/",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME=/root",
        ]
        return self._run([*enter, *clean, "/bin/sh", "-c", command], stdin, timeout_s, check)

    def _run(self, line: list[str], stdin: str, timeout_s: float, check: bool) -> subprocess.CompletedProcess[str]:
        try:
            done = subprocess.run(line, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            raise RigProblem(f"{self.name}: `{line[-1]}` did not end within {timeout_s:.0f} s") from None
        if check and done.returncode != 0:
            raise RigProblem(f"{self.name}: `{line[-1]}` failed ({done.returncode}): {done.stderr}{done.stdout}")
        return done

    def known_hosts_line(self) -> str:
        """Return the line of ssh_known_hosts that vouches for it (sshd(8))."""
        return f"{self.address} {' '.join(self.host_key.split()[:2])}"

    def host_block(self, *lines: str, user: str = "root") -> str:
        """Return its `Host` block for an inventory; `lines` are more keywords, as `Worker tiny model=rbee-demo`."""
        own = [f"HostName {self.address}", f"User {user}", f"IdentityFile {self.key}", "IdentitiesOnly yes"]
        return "\n    ".join([f"Host {self.name}", *own, f"UserKnownHostsFile {self.known_hosts}", *lines]) + "\n"

    def journal(self, unit: str = "") -> str:
        """Return what a unit, or the whole machine, wrote to the journal, over all boots."""
        return self.console(f"journalctl --no-pager --output=short-monotonic {f'-u {unit}' if unit else ''}").stdout

    # Its power

    def power_on(self) -> None:
        """Boot it and wait until systemd is done; RigProblem when it does not come up."""
        self.network.detach(self.namespace)
        self.network.attach(self.namespace, self.address)
        self.process = nspawn.start(self.namespace, self.disk.root, self.name, self.folder / "console.log")
        wait_until(self._answers, f"{self.name} to answer ssh")
        self.ssh("systemctl is-system-running --wait", check=False)

    def _answers(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            console = (self.folder / "console.log").read_text(errors="replace")
            raise RigProblem(f"{self.name} ended while booting ({self.process.returncode}): {console[-2000:]}")
        probe = ["ssh", "-F", str(self.folder / "ssh_config"), f"root@{self.name}", "true"]
        return subprocess.run(probe, capture_output=True, timeout=HANG_GUARD_S, check=False).returncode == 0

    def power_off(self) -> None:
        """Cut its power: no goodbye on the network, no unit stopped; its disk stays as it was."""
        self.network.detach(self.namespace)
        self._hang_up()
        nspawn.kill(self.namespace)
        self._reap()

    def shut_down(self) -> None:
        """Stop its units and turn it off, as an administrator does."""
        self._hang_up()
        self.console("systemctl --no-block poweroff")
        if self.process is not None:
            self.process.wait(timeout=HANG_GUARD_S)
        self.power_off()

    def reboot(self) -> None:
        """Shut it down and boot it again."""
        self.shut_down()
        self.power_on()

    def is_on(self) -> bool:
        """Tell whether it has any process."""
        return nspawn.groups(self.namespace)[0].exists() and bool(nspawn.members(self.namespace))

    def _hang_up(self) -> None:
        for user in ("root", "deploy", "walled"):
            if (self.folder / f"mux-{user}").exists():
                line = ["ssh", "-F", str(self.folder / "ssh_config"), "-O", "exit", f"{user}@{self.name}"]
                subprocess.run(line, capture_output=True, timeout=HANG_GUARD_S, check=False)

    def _reap(self) -> None:
        if self.process is not None:
            self.process.wait(timeout=HANG_GUARD_S)
            self.process = None

    # What can befall it

    def freeze(self) -> None:
        """Stop every process where it stands; its kernel still answers pings and accepts connections."""
        nspawn.freeze(self.namespace, True)

    def thaw(self) -> None:
        """Let its processes go on."""
        nspawn.freeze(self.namespace, False)

    def blackhole(self, direction: Direction = "both", *, peer: str = "", percent: int = 100) -> None:
        """Let its packets vanish, all or those of the address `peer`; replaces an earlier fault of its link."""
        self.network.drop(self.namespace, direction, peer, percent)

    def reset_connections(self, port: int) -> None:
        """Answer everything to a TCP port with a reset; replaces an earlier fault of its link."""
        self.network.reset(self.namespace, port)

    def limit_rate(self, bits_per_s: int) -> None:
        """Slow down what it sends."""
        network.limit_rate(self.namespace, bits_per_s)

    def heal(self) -> None:
        """End every fault of its link."""
        self.network.heal(self.namespace)

    def fill_disk(self, leave_bytes: int = 0) -> None:
        """Use its disk up but for `leave_bytes`."""
        self.disk.fill(leave_bytes)

    def free_disk(self) -> None:
        """Give the room back that `fill_disk` took."""
        self.disk.free()

    def failed_units(self) -> list[str]:
        """Return the units that systemd calls failed."""
        return self.console("systemctl list-units --failed --plain --no-legend | cut -d' ' -f1").stdout.split()

    def change_host_key(self) -> None:
        """Give it another host key, as a reinstalled machine has; its owner's `known_hosts` has the old one."""
        self._hang_up()
        self.host_key = self.disk.new_host_key(self.name)
        self.folder.joinpath("rig_known_hosts").write_text(f"{self.known_hosts_line()}\n")
        self.console("systemctl restart ssh")
