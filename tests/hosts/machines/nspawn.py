"""A machine's processes: systemd-nspawn in control groups of its own.

Of its own, because nspawn names its groups `payload` and `supervisor` below the caller's: two machines in one group
would share one systemd tree, and a killed nspawn leaves its payload running. One write to the group ends or freezes
all of it.
"""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from .commands import RigProblem, wait_until

CGROUPS = Path("/sys/fs/cgroup")
OPTIONS = [
    *("--quiet", "--settings=no", "--boot", "--register=no", "--keep-unit", "--console=read-only"),
    *("--resolv-conf=off", "--timezone=off", "--link-journal=no"),
]
# The process moves itself into each group, then becomes nspawn.
ENTER = 'set -e; while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs"; shift; done; shift; exec "$@"'


def unified() -> Path:
    """Return the mount of the version 2 hierarchy (cgroups(7)); RigProblem when there is none."""
    for place in (CGROUPS, CGROUPS / "unified"):
        if (place / "cgroup.procs").exists() and (place / "cgroup.controllers").exists():
            return place
    raise RigProblem("test machines need the cgroup v2 hierarchy, at /sys/fs/cgroup or /sys/fs/cgroup/unified")


def groups(name: str) -> list[Path]:
    """Return the control groups of a machine, the version 2 one first."""
    legacy = CGROUPS / "systemd" / name
    further = [legacy if (legacy.parent / "cgroup.procs").exists() else None, memory_group(name)]
    return [unified() / name, *(group for group in further if group)]


def memory_group(name: str) -> Path | None:
    """Return a machine's group in the version 1 memory hierarchy, below the controller's own; None without one."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return CGROUPS / "memory" / path.lstrip("/") / name
    return None


def start(name: str, root: Path, hostname: str, log: Path) -> subprocess.Popen[bytes]:
    """Boot a tree in the network namespace of the same name."""
    own = groups(name)
    for group in own:
        group.mkdir(exist_ok=True)
    where = [f"--machine={name}", f"--hostname={hostname}", f"--directory={root}"]
    nspawn = ["systemd-nspawn", *OPTIONS, *where, f"--network-namespace-path=/run/netns/{name}"]
    command = ["/bin/sh", "-c", ENTER, "sh", *map(str, own), "--", *nspawn]
    with log.open("ab") as out:
        # A session of its own: Ctrl+C in the terminal must not cut the power before the tests are torn down.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)


def members(name: str) -> list[int]:
    """Return the machine's processes, by the controller's numbers."""
    found = []
    for procs in groups(name)[0].rglob("cgroup.procs"):
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in procs.read_text().split()]
    return found


def members_of_unit(name: str, unit: str) -> list[int]:
    """Return the processes of one unit of the machine, by the controller's numbers."""
    found = []
    for procs in groups(name)[0].glob(f"**/{unit}/**/cgroup.procs"):
        found += [int(pid) for pid in procs.read_text().split()]
    return found


def first_process(name: str) -> int:
    """Return the controller's number of the machine's process 1; RigProblem when it is off."""
    for pid in members(name):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            if next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[2:] == ["1"]:
                return pid
    raise RigProblem(f"{name} is off")


def kill(name: str) -> None:
    """End all processes of a machine at once, as a power cut does, and remove its groups."""
    own = [group for group in groups(name) if group.exists()]
    if own and own[0] == groups(name)[0]:
        (own[0] / "cgroup.kill").write_text("1")
        wait_until(lambda: not members(name), f"the processes of {name} to end")
    for group in own:
        wait_until(lambda group=group: removed(group), f"{group} to be empty")  # type: ignore[misc]
    with contextlib.suppress(FileNotFoundError):
        Path("/run/systemd/nspawn/propagate", name).rmdir()


def removed(group: Path) -> bool:
    """Remove a control group and those below it; false while a process is on its way out of one."""
    below = sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True)
    try:
        for folder in [*below, group]:
            folder.rmdir()
    except OSError:
        return not group.exists()
    return True


def freeze(name: str, frozen: bool) -> None:
    """Stop every process of a machine where it stands, or let them go on."""
    group = groups(name)[0]
    (group / "cgroup.freeze").write_text(str(int(frozen)))
    wanted = f"frozen {int(frozen)}"
    wait_until(lambda: wanted in (group / "cgroup.events").read_text(), f"{name} to be {wanted}")
