"""Time `POST /v1/jobs`, one after the other, beside what it cannot do without: an answer of the queen, and one fsync.

usage: python -m bench.jobs [--rounds N] [--jobs N]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from bench.figures import conditions, spread, table
from rbee.testing.openai_server import running_server
from rbee.testing.programs import running_queen, until

JOB = json.dumps(
    {
        "endpoint": "/v1/chat/completions",
        "body": {"model": "honey", "messages": [{"role": "user", "content": "one two three"}]},
    }
)
PAUSE_S = 0.05
"""Between two jobs, so that the one before has run: its own writes are not what is timed."""
HEAD = ("median ms of a round", "min", "median", "max")


def main() -> None:
    """Print a table of the rounds' medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=100)
    given = parser.parse_args()
    print(conditions(["rbee", "gunicorn", "gevent"]))
    with tempfile.TemporaryDirectory() as name, running_server("honey") as server:
        inventory = Path(name)
        line = f"  Worker mock model=honey url={server.url}/v1 slots=64\n"
        (inventory / "fleet.conf").write_text(f"IgnoreUnknown Hive*,Worker*\nHost desk\n  HivePort none\n{line}")
        with running_queen("--no-hive", "--inventory", str(inventory)) as queen:
            address = urlsplit(queen.url)
            connection = http.client.HTTPConnection(address.hostname or "", address.port)
            until(lambda: b"honey" in asked(connection, "GET", "/v1/models"), "the server of the inventory")
            rounds = [measured(connection, inventory / "probe", given.jobs) for _ in range(given.rounds)]
    rows = [[what, *spread(one[what] for one in rounds).cells(2)] for what in rounds[0]]
    print(table(HEAD, rows))


def measured(connection: http.client.HTTPConnection, probe: Path, jobs: int) -> dict[str, float]:
    """Return the medians of one round, in ms; the three are taken in turns."""
    times: dict[str, list[float]] = {"POST /v1/jobs": [], "GET /health": [], "fsync of 4 KiB": []}
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for _ in range(jobs):
            times["POST /v1/jobs"].append(timed(lambda: asked(connection, "POST", "/v1/jobs", JOB)))
            times["GET /health"].append(timed(lambda: asked(connection, "GET", "/health")))
            times["fsync of 4 KiB"].append(timed(lambda: written(descriptor)))
            time.sleep(PAUSE_S)
    finally:
        os.close(descriptor)
    medians = {what: spread(values).median for what, values in times.items()}
    return {**medians, "in the queen (job less health)": medians["POST /v1/jobs"] - medians["GET /health"]}


def timed(act: Callable[[], object]) -> float:
    """Return how long something takes, in ms."""
    began = time.perf_counter()
    act()
    return (time.perf_counter() - began) * 1000


def asked(connection: http.client.HTTPConnection, method: str, path: str, body: str | None = None) -> bytes:
    """Return the body of a good answer."""
    connection.request(method, path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    data = answer.read()
    assert answer.status in (200, 202), data
    return data


def written(descriptor: int) -> None:
    """Write 4 KiB and have them on the disk."""
    os.write(descriptor, b"x" * 4096)
    os.fsync(descriptor)


if __name__ == "__main__":
    main()
