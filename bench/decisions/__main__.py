"""Time whole routing decisions over fleets of several sizes, as the queen makes them for a job.

usage: python -m bench.decisions [--calls N]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench.figures import conditions, table
from rbee.queen.access import LOCAL
from rbee.queen.client_watch import ClientWatch
from rbee.queen.decisions import DecisionLog
from rbee.queen.fleet import Fleet
from rbee.queen.hives import Worker
from rbee.queen.job import Job
from rbee.queen.routing import Routing
from rbee.queen.script import RoutingScript
from rbee.wire.fleet import EngineReport, HiveReport, ModelReport, WorkerAccess, WorkerReport, WorkerState
from rbee.wire.openai import ChatRequest, Message

SIZES = (1, 10, 100, 1000)
SCRIPTS: dict[str, str | Path] = {
    "built-in": "",
    "one filter": "fn route_task(task, workers) { workers.filter(|w| w.loaded).least_loaded() }",
    "consumer example": Path(__file__).parents[2].joinpath("tests/data/scripts/consumer-use-case-1.rhai"),
    "no closure": "fn route_task(task, workers) { workers.least_loaded() }",
    "three fallbacks": 'fn route_task(task, workers) { workers.sort_by("load").extract(0, 3) }',
}
HEAD = ("script", "workers", "min µs", "p50 µs", "p99 µs")


class Timed(NamedTuple):
    """Times of one decision, in µs."""

    least: float
    p50: float
    p99: float


def main() -> None:
    """Print a row for each script and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=500)
    calls = parser.parse_args().calls
    print(conditions(["rbee", "rhai-py", "gevent"]))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for label, source in SCRIPTS.items():
            text = source.read_text("utf-8") if isinstance(source, Path) else source
            for count in SIZES:
                times = measured(Path(name), text, count, calls)
                rows.append([label, str(count), *(f"{value:.0f}" for value in times)])
    print(table(HEAD, rows))


def measured(folder: Path, source: str, count: int, calls: int) -> Timed:
    """Time decisions, each for a new job, while workers take and end jobs in between."""
    path = folder / "scheduler.rhai"
    path.unlink(missing_ok=True)
    if source:
        path.write_text(source)
    fleet, workers = fleet_of(folder, count)
    decisions = DecisionLog(folder / "decisions.jsonl")
    routing = Routing(fleet, RoutingScript(path), choice_timeout_s=1.0, decisions=decisions)
    request = ChatRequest(model="llama-3-70b-x", messages=[Message(role="user", content="x" * 400)])
    turns = itertools.cycle(workers)
    times = []
    for number in range(calls + 20):
        busy = next(turns)
        busy.in_flight += 1
        busy.ttft_ms = 0.8 * busy.ttft_ms + number % 7
        job = Job("/v1/chat/completions", request, b"", LOCAL, ClientWatch(None))
        start = time.perf_counter_ns()
        routing.rank(job)
        times.append((time.perf_counter_ns() - start) / 1000)
        busy.in_flight -= number % 3 == 0
        decisions.flush()
    kept = sorted(times[20:])
    return Timed(kept[0], kept[len(kept) // 2], kept[int(len(kept) * 0.99)])


def fleet_of(folder: Path, count: int) -> tuple[Fleet, list[Worker]]:
    """Return a fleet of hives with four workers each, the first three named as in the consumer example."""
    fleet = Fleet(folder / "fleet.json", "token")
    names = itertools.chain(["mac-studio", "gaming-pc", "old-server"], (f"box-{n}" for n in itertools.count()))
    for first in range(0, count, 4):
        fleet.learn(report(next(names), min(4, count - first)))
    return fleet, [worker for hive in fleet.hives.values() for worker in hive.workers.values()]


def report(hive: str, workers: int) -> HiveReport:
    """Return a hive with so many ready workers of one model; it cannot start another one."""
    ready = [
        WorkerReport(
            name=f"w{n}", model="llama-3-70b-x", backend="engine", state=WorkerState.READY, device="cuda",
            capabilities=["chat"], slots=4, access=WorkerAccess(url="http://127.0.0.1:9"),
        )
        for n in range(workers)
    ]  # fmt: skip
    return HiveReport(
        hive=hive, url=f"http://{hive}:1", version="0", epoch=1.0, sequence=1, workers=ready,
        models=[ModelReport(name="llama-3-70b-x", capabilities=["chat"], format="gguf")],
        engines=[EngineReport(name="engine", capabilities=["chat"], formats=["other"])],
    )  # fmt: skip


if __name__ == "__main__":
    main()
