"""The file tree that all machines share, read-only below their own overlays: Debian, made once by debootstrap.

It is a bare host as people have them: sshd and python3, no venv, no pip, no libgomp1.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from .commands import RigProblem, run

SUITE = "bookworm"
PACKAGES = (
    "systemd,systemd-sysv,dbus,openssh-server,openssh-client,python3,iproute2,sudo,procps,ca-certificates,git,curl"
)
TOOLS = {
    "debootstrap": "debootstrap",
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "tc": "iproute2",
    "nft": "nftables",
    "ssh": "openssh-client",
    "nsenter": "util-linux",
}
BUILD_LIMIT_S = 1800.0

# Host keys, machine id and host name are each machine's own.
SETUP = """
set -eu
rm -f /etc/ssh/ssh_host_* /etc/hostname /var/cache/apt/archives/*.deb
: > /etc/machine-id
mkdir -p /var/log/journal /root/.ssh
useradd --create-home --shell /bin/bash deploy
useradd --create-home --shell /bin/bash walled
echo 'walled:walled' | chpasswd
echo 'deploy ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/deploy
echo 'walled ALL=(ALL) ALL' > /etc/sudoers.d/walled
chmod 0440 /etc/sudoers.d/deploy /etc/sudoers.d/walled
for user in root deploy walled; do
    home=$(getent passwd "$user" | cut -d: -f6)
    install -d -m 0700 -o "$user" -g "$user" "$home/.ssh"
done
systemctl mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer
systemctl mask getty.target console-getty.service
"""


def why_no_machines() -> str:
    """Return why this controller cannot have test machines and what to do, or nothing when it can try."""
    if os.geteuid() != 0:
        return "test machines need root (mounts, network namespaces): run these tests as root"
    missing = [package for tool, package in TOOLS.items() if not shutil.which(tool, path=search_path())]
    if missing:
        wanted = " ".join(dict.fromkeys(missing))
        return f"test machines need these: apt-get install --no-install-recommends {wanted}"
    return ""


def search_path() -> str:
    """Return PATH with the administrator's folders, which a plain user's lacks."""
    return f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


def base_tree(say: Callable[[str], None]) -> Path:
    """Return the base tree's folder, building it first when the cache lacks it; RigProblem when that fails.

    The cache is $RBEE_TEST_CACHE or ~/.cache/rbee-tests. A lock lets one process build while others wait, and an
    interrupted build never gets the final name.
    """
    cache = Path(os.environ.get("RBEE_TEST_CACHE") or Path.home() / ".cache" / "rbee-tests")
    key = hashlib.sha256(repr((SUITE, PACKAGES, SETUP)).encode()).hexdigest()[:12]
    base = cache / f"base-{key}"
    if base.is_dir():
        return base
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        say(f"building the base tree of the test machines in {cache} (once, one to two minutes)")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not base.is_dir():
            building = cache / "base.building"
            shutil.rmtree(building, ignore_errors=True)
            build(building, lock.fileno())
            building.rename(base)
    return base


def build(tree: Path, lock: int) -> None:
    """Install Debian into a new folder; RigProblem when that fails.

    The installer and its mounts end with this process, however that ends, and the lock is free no sooner.
    """
    log = tree.with_suffix(".log")
    isolated = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]
    install = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(tree), mirror()]
    environment = {**os.environ, "PATH": search_path(), "LC_ALL": "C"}
    with log.open("w") as out:
        try:
            subprocess.run(
                [*isolated, *install],
                stdout=out,
                stderr=out,
                env=environment,
                pass_fds=[lock],
                timeout=BUILD_LIMIT_S,
                check=True,
            )
        except subprocess.CalledProcessError:
            last = log.read_text(errors="replace").splitlines()[-1:]
            raise RigProblem(f"debootstrap failed ({' '.join(last)}): is the mirror in reach? See {log}") from None
        except subprocess.TimeoutExpired:
            raise RigProblem(f"debootstrap did not end within {BUILD_LIMIT_S:.0f} s: see {log}") from None
    run("chroot", str(tree), "/bin/sh", "-c", SETUP)


def mirror() -> str:
    """Return the address that this controller's own apt takes Debian from."""
    given = os.environ.get("RBEE_TEST_MIRROR")
    found = given or next(addresses(Path("/etc/apt")), "")
    if not found:
        raise RigProblem("no Debian mirror in /etc/apt: set RBEE_TEST_MIRROR to one")
    return found


def addresses(apt: Path) -> Iterator[str]:
    """Yield the Debian mirrors that apt's source files name (sources.list(5))."""
    for path in [*sorted(apt.glob("sources.list.d/*.sources")), *sorted(apt.glob("**/*.list"))]:
        for line in path.read_text(errors="replace").splitlines():
            words = [word for word in line.split() if "=" not in word and word not in ("[", "]")]
            if words and words[0] in ("URIs:", "deb"):
                yield from (word for word in words[1:2] if word.rstrip("/").endswith("debian"))
