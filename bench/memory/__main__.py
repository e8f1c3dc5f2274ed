"""Read what queen, hive and worker hold in memory with the built-in model, idle, from /proc/PID/smaps_rollup (proc(5)).

usage: python -m bench.memory [--rounds N] [--answers N]
"""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from bench.figures import Spread, conditions, spread, table
from rbee.client import Client
from rbee.testing.programs import RunningQueen, processes_of, running_queen

MODEL = "rbee-demo"
SETTLE_S = 2.0
ROLES = {"rbee.hive": "hive", "rbee.worker": "worker: front", "rbee_xllamacpp.engine": "worker: engine"}
MASTER, SERVER = "queen: master", "queen: server process"
HEAD = ("process", "RSS min", "median", "max", "PSS min", "median", "max")


@dataclass(frozen=True)
class Memory:
    """What a process holds, in MB (10^6 bytes). PSS shares out the pages that several processes map."""

    rss_mb: float
    pss_mb: float

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.rss_mb + other.rss_mb, self.pss_mb + other.pss_mb)


Readings = dict[str, list[Memory]]


def main() -> None:
    """Run the rounds and print a table for each moment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=50, help="answers before the last reading")
    given = parser.parse_args()
    size_mb = Path(str(resources.files("rbee") / "models" / f"{MODEL}.gguf")).stat().st_size / 1e6
    print(conditions(["rbee", "xllamacpp", "gunicorn", "gevent"]))
    print(f"MB are 10^6 bytes; the model file has {size_mb:.1f} MB.")
    moments: dict[str, Readings] = defaultdict(lambda: defaultdict(list))
    for _ in range(given.rounds):
        with running_queen() as queen:
            read(queen, moments["before the first job"])
            ask(queen, 1)
            read(queen, moments["after one answer"])
            ask(queen, given.answers - 1)
            read(queen, moments[f"after {given.answers} answers"])
    for moment, readings in moments.items():
        print(f"\n{moment}:\n")
        print(table(HEAD, rows(readings, size_mb)))


def ask(queen: RunningQueen, count: int) -> None:
    """Get so many whole answers from the built-in model, one after the other."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "How do I add a machine?"}], "max_tokens": 32}
    client = Client(queen.url, timeout_s=120.0)
    for _ in range(count):
        client.post("/v1/chat/completions", body, dict[str, Any])
    client.close()


def read(queen: RunningQueen, readings: Readings) -> None:
    """Let the processes come to rest and note what each holds."""
    time.sleep(SETTLE_S)
    now = {role(pid, command, queen.process.pid): memory(pid) for pid, command in processes_of(queen.home)}
    parts = [one for name, one in now.items() if name.startswith("worker: ")]
    if parts:
        now["worker: together"] = sum(parts[1:], parts[0])
    for name, one in now.items():
        readings[name].append(one)


def role(pid: int, command: str, master_pid: int) -> str:
    """Name a process by its module."""
    if pid == master_pid:
        return MASTER
    found = re.search(r" -m (\S+)", command)
    module = found[1] if found else command
    return SERVER if module == "rbee.queen" else ROLES.get(module, module)


def memory(pid: int) -> Memory:
    """Read one process."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE))
    return Memory(int(fields["Rss"]) * 1024 / 1e6, int(fields["Pss"]) * 1024 / 1e6)


def rows(readings: Readings, size_mb: float) -> list[list[str]]:
    """Return the lines of one table."""
    lines = []
    for name, of in sorted(readings.items()):
        lines.append(_row(name, spread(one.rss_mb for one in of), spread(one.pss_mb for one in of)))
    whole = readings.get("worker: together")
    if whole:
        less = (spread(one.rss_mb - size_mb for one in whole), spread(one.pss_mb - size_mb for one in whole))
        lines.append(_row("worker: together, less the model file", *less))
    return lines


def _row(name: str, rss: Spread, pss: Spread) -> list[str]:
    return [name, *rss.cells(1), *pss.cells(1)]


if __name__ == "__main__":
    main()
