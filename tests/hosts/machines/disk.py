"""A machine's disk: an overlay over the base tree, whose changes lie in a tmpfs of the disk's size."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from .commands import run

USERS = {"root": "root", "deploy": "home/deploy", "walled": "home/walled"}


@dataclass(frozen=True)
class Disk:
    """The mounts below a machine's state folder; they stay while the machine is off."""

    folder: Path

    @property
    def root(self) -> Path:
        """Return the machine's `/` as the controller sees it; what either writes there, the other reads."""
        return self.folder / "root"

    @property
    def store(self) -> Path:
        """Return the tmpfs that holds what the machine wrote."""
        return self.folder / "disk"

    def mount(self, base: Path, size_bytes: int) -> None:
        """Mount a fresh disk."""
        self.root.mkdir()
        self.store.mkdir()
        run("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "rbee-tests", str(self.store))
        upper, work = self.store / "upper", self.store / "work"
        upper.mkdir()
        work.mkdir()
        layers = f"lowerdir={base},upperdir={upper},workdir={work}"
        run("mount", "-t", "overlay", "-o", layers, "rbee-tests", str(self.root))

    def seed(self, hostname: str, address: str, public_key: str) -> str:
        """Write what makes this machine itself, and return its public host key."""
        etc = self.root / "etc"
        (etc / "machine-id").write_text(uuid.uuid4().hex + "\n")
        (etc / "hostname").write_text(hostname + "\n")
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{address} {hostname}\n")
        for user, home in USERS.items():
            self.give_key(user, self.root / home / ".ssh" / "authorized_keys", public_key)
        return self.new_host_key(hostname)

    def new_host_key(self, comment: str) -> str:
        """Make the machine another host key and return its public half."""
        path = self.root / "etc/ssh/ssh_host_ed25519_key"
        path.unlink(missing_ok=True)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path))
        return path.with_suffix(".pub").read_text().strip()

    def give_key(self, user: str, path: Path, public_key: str) -> None:
        """Let the rig's key in."""
        owner = path.parent.stat()
        path.write_text(public_key)
        path.chmod(0o600)
        os.chown(path, owner.st_uid, owner.st_gid)

    def fill(self, leave_bytes: int) -> None:
        """Use the disk up but for `leave_bytes`, by a file that the machine cannot see."""
        self.free()
        wanted = shutil.disk_usage(self.store).free - leave_bytes
        # What is free may be used up by the machine meanwhile.
        with contextlib.suppress(OSError), (self.store / "filler").open("wb") as filler:
            if wanted > 0:
                os.posix_fallocate(filler.fileno(), 0, wanted)

    def free(self) -> None:
        """Give back what `fill` used up."""
        (self.store / "filler").unlink(missing_ok=True)
