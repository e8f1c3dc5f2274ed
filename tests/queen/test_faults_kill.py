"""The queen's processes are killed at random moments under a stream of jobs: none that was accepted is lost or changed.

`RBEE_KILL_ROUNDS=200` has more rounds run.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from job_calls import CHAT, call, chat, ended, rows
from queen_rig import FleetFolder, free_port

from rbee.testing.openai_server import Told, running_server
from rbee.testing.programs import RunningQueen, processes_of, running_queen, until

ROUNDS = int(os.environ.get("RBEE_KILL_ROUNDS", "20"))
MAKERS = 2
JOBS_A_ROUND = 30


def honey(words: int, **fields: Any) -> dict[str, Any]:
    return {**chat("word " * words, **fields), "model": "honey"}


class Makers:
    """Clients that create jobs until they are told to end, whatever becomes of the queen meanwhile.

    `accepted` are the jobs that were acknowledged, with the words that each must be answered with, and whether it is
    streamed. Each is created with a key of its own, and once more where no answer came.
    """

    def __init__(self, seed: int) -> None:
        self.accepted: dict[str, tuple[int, bool]] = {}
        self.keys_used = 0
        self._random = random.Random(seed)
        self._queen: RunningQueen | None = None
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._make) for _ in range(MAKERS)]

    def begin(self, queen: RunningQueen) -> None:
        """Begin, or go on with the next queen at the same address."""
        first, self._queen = self._queen is None, queen
        for thread in self._threads if first else ():
            thread.start()

    def close(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(120)

    def _make(self) -> None:
        while not self._end.is_set():
            words, stream = self._random.randrange(1, 9), self._random.random() < 0.3
            body = honey(words, stream=stream, **({"stream_options": {"include_usage": True}} if stream else {}))
            self.keys_used += 1
            key = f"key-{threading.get_ident()}-{self.keys_used}"
            while not self._end.is_set():
                made = self._created(body, key)
                if made:
                    self.accepted[made] = words, stream
                    break
                self._end.wait(0.05)

    def _created(self, body: dict[str, Any], key: str) -> str:
        """Return the id of the job, or nothing when there was no answer, or one that says to come again."""
        assert self._queen is not None
        with contextlib.suppress(OSError, http.client.HTTPException, json.JSONDecodeError):
            wanted = {"endpoint": CHAT, "body": body}
            status, _, made = call(self._queen, "POST", "/v1/jobs", wanted, Idempotency_Key=key)
            assert status in (202, 503), made
            return str(made["job_id"]) if status == 202 else ""
        return ""


def master_and_server(queen: RunningQueen) -> tuple[int, int]:
    """Return the master, and its server process once there is one again."""
    found: list[int] = []

    def one() -> bool:
        pids = [pid for pid, line in processes_of(queen.home) if "rbee.queen run" in line]
        found[:] = [pid for pid in pids if pid != queen.process.pid]
        return len(found) == 1

    until(one, "one server process")
    return queen.process.pid, found[0]


def server_process(queen: RunningQueen) -> int:
    """Return the server process, once there is one again."""
    found: list[int] = []

    def one() -> bool:
        found[:] = [
            pid for pid, line in processes_of(queen.home) if "rbee.queen run" in line and pid != queen.process.pid
        ]
        return len(found) == 1

    until(one, "one server process")
    return found[0]


@pytest.mark.timeout(max(300, 15 * ROUNDS))
def test_no_accepted_job_is_lost_when_processes_are_killed(fleet: FleetFolder, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    moments, makers, killed = random.Random(seed), Makers(seed), 0
    options = ["--no-hive", "--port", str(free_port()), "--inventory", str(fleet.folder)]

    def some_more() -> None:
        """Wait until a random number of further jobs was accepted."""
        wanted = len(makers.accepted) + moments.randrange(1, JOBS_A_ROUND)
        until(lambda: len(makers.accepted) >= wanted, f"jobs to be accepted (seed {seed})")

    with running_server(word_s=0.01) as server, contextlib.closing(makers):
        fleet.write(desk=["HivePort none", f"Worker s model=honey slots=8 url={server.url}"])
        while killed < ROUNDS:
            with running_queen(*options, home=tmp_path) as queen:
                makers.begin(queen)
                for _ in range(moments.randrange(3)):
                    some_more()
                    os.kill(server_process(queen), signal.SIGKILL)  # the master starts another
                    killed += 1
                some_more()
                queen.process.kill()  # its server process ends by itself, and the next one waits for that
                killed += 1
        makers.close()
        with running_queen(*options, home=tmp_path) as queen:
            views = {job: ended(queen, job) for job in makers.accepted}
        told = server.told()
    check(tmp_path, makers, views, told, seed)


def check(home: Path, makers: Makers, views: dict[str, dict[str, Any]], told: Told, seed: int) -> None:
    usage = {row[0]: row[1:] for row in rows(home, "SELECT job, prompt_tokens, completion_tokens FROM usage")}
    for job, (words, streamed) in makers.accepted.items():
        status = views[job]["status"]
        assert status == "completed" or (streamed and status == "interrupted"), (seed, views[job])
        if status == "completed":
            # The worker gives a token a word, and says so.
            assert usage[job] == (words, words), (seed, job, usage[job])
    assert rows(home, "SELECT count(*) FROM jobs WHERE status IN ('queued', 'running')") == [(0,)]
    [(jobs, of_id)] = rows(home, "SELECT count(*), count(DISTINCT id) FROM jobs")
    # A request whose answer was lost was sent again with its key, and is the same job.
    assert len(makers.accepted) <= jobs == of_id <= makers.keys_used
    assert rows(home, "PRAGMA integrity_check") == [("ok",)]
    assert told.answered >= sum(view["status"] == "completed" for view in views.values())
