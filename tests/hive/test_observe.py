"""What is read of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rbee.hive import observe
from rbee.process_memory import children, family_memory_bytes, memory_bytes
from rbee.testing.programs import until

MEMINFO = (
    "MemTotal:        8000000 kB\nMemFree:          100000 kB\nMemAvailable:    6000000 kB\nHugePages_Total:       0\n"
)
GIB = 2**30


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, content in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_this_machine_has_a_processor_with_memory() -> None:
    (device,) = observe.devices()
    assert device.kind == "cpu"
    assert device.name
    assert 0 < device.memory_free_bytes <= device.memory_total_bytes


def test_a_machine_without_limits(tmp_path: Path) -> None:
    cpuinfo = "processor\t: 0\nmodel name\t: Some  CPU @ 3.00GHz\nprocessor\t: 1\nmodel name\t: Some CPU @ 3.00GHz\n"
    device = observe.cpu(machine(tmp_path, {"proc/cpuinfo": cpuinfo}))
    assert device.name == f"Some CPU @ 3.00GHz, {observe.cores()} cores"
    assert (device.memory_total_bytes, device.memory_free_bytes) == (8000000 * 1024, 6000000 * 1024)


CGROUPS = {
    "v2, limited in the middle": (
        "0::/user.slice/box/inner\n",
        {
            "sys/fs/cgroup/user.slice/box/inner/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/box/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/user.slice/box/memory.current": f"{GIB // 2}\n",
        },
        (2 * GIB, 3 * GIB // 2),
    ),
    "v1": (
        "5:cpu:/a\n4:memory:/box\n0::/\n",
        {
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
        },
        (GIB, 0),
    ),
    "in a container, whose own path is outside": (
        "0::/../../elsewhere\n",
        {"sys/fs/cgroup/memory.max": f"{GIB}\n", "sys/fs/cgroup/memory.current": "0\n"},
        (GIB, GIB),
    ),
    "nonsense": ("0::/box\n", {"sys/fs/cgroup/box/memory.max": "lots\n"}, (8000000 * 1024, 6000000 * 1024)),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_a_control_group_limits_the_memory(tmp_path: Path, case: str) -> None:
    groups, files, expected = CGROUPS[case]
    device = observe.cpu(machine(tmp_path, {"proc/self/cgroup": groups, **files}))
    assert (device.memory_total_bytes, device.memory_free_bytes) == expected


def test_a_process_is_known_by_its_start_even_with_a_hostile_name(tmp_path: Path) -> None:
    fields = " ".join(str(number) for number in range(4, 53))
    machine(tmp_path, {"proc/77/stat": f"77 (a) Z 1 (b) S {fields}\n"})
    assert observe.start_ticks(77, tmp_path) == 22
    assert list(observe.session_members(6, tmp_path)) == [77]


def test_a_zombie_and_a_process_that_is_gone_have_no_start() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert observe.start_ticks(child.pid) == 0
    child.wait()
    assert observe.start_ticks(child.pid) == 0
    assert memory_bytes(child.pid) == 0
    assert observe.command_line(child.pid) == []


def test_memory_of_this_process() -> None:
    assert memory_bytes(os.getpid()) > 1_000_000


def test_a_worker_counts_with_what_it_started_in_a_session_of_its_own() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'], start_new_session=True)"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, start_new_session=True) as child:
        until(lambda: children(child.pid), "the grandchild to run")
        alone = memory_bytes(child.pid)
        assert family_memory_bytes(child.pid) > alone > 0
        child.communicate(b"\n")
