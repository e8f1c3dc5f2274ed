"""What was acknowledged survives `kill -9` of everything, at any moment."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import threading
from collections.abc import Iterable
from pathlib import Path

from job_calls import CHAT, call, chat, ended, events, following, post_job, rows, slow_worker

from rbee.testing.programs import RunningQueen, processes_of, running_queen, until

ROUNDS = 20
ANSWERS_A_ROUND = 25


def kill_everything(queen: RunningQueen, at_once: Iterable[int] = ()) -> None:
    """Kill every process of this queen, without a word; those that are known already, this very moment."""
    for pid in at_once:
        os.kill(pid, signal.SIGKILL)
    for pid, _ in processes_of(queen.home):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    queen.process.wait()
    until(lambda: not processes_of(queen.home), "every process to end")


class Makers:
    """Two clients that create jobs until nothing answers them, and remember which were accepted."""

    def __init__(self, queen: RunningQueen) -> None:
        self.jobs: dict[str, bool] = {}
        self._queen = queen
        self._threads = [threading.Thread(target=self._make) for _ in range(2)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _make(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, json.JSONDecodeError):
            while self._queen.process.poll() is None:
                stream = random.random() < 0.3
                body = chat("a b c", stream=stream, **({"stream_options": {"include_usage": True}} if stream else {}))
                status, _, made = call(self._queen, "POST", "/v1/jobs", {"endpoint": CHAT, "body": body})
                if status == 202:
                    self.jobs[made["job_id"]] = stream


def answered(queen: RunningQueen) -> tuple[str, tuple[int, int]]:
    """Ask, and return the job with the tokens that the answer tells of."""
    status, headers, answer = call(queen, "POST", CHAT, chat("a b c"))
    assert status == 200, answer
    return headers["x-rbee-job"], (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"])


def test_nothing_acknowledged_is_lost_and_usage_is_exact(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    jobs: dict[str, bool] = {}
    answers: dict[str, tuple[int, int]] = {}
    for number in range(ROUNDS):
        with running_queen(home=tmp_path) as queen:
            answers |= [answered(queen)]
            serving = [pid for pid, command in processes_of(tmp_path) if "rbee.queen" in command]
            makers = Makers(queen)
            if number % 2:
                # In the other rounds nothing but the answers below makes the queen write.
                makers.start()
            for _ in range(moments.randrange(1, ANSWERS_A_ROUND)):
                answers |= [answered(queen)]
            kill_everything(queen, serving)
            if number % 2:
                makers.join()
            jobs |= makers.jobs
    with running_queen(home=tmp_path) as queen:
        views = {job: ended(queen, job) for job in jobs}
        queen.process.send_signal(signal.SIGTERM)
        queen.process.wait(60)
    for job, view in views.items():
        assert view["status"] == "completed" or (jobs[job] and view["status"] == "interrupted"), (seed, view)
    usage = {row[0]: row[1:] for row in rows(tmp_path, "SELECT job, prompt_tokens, completion_tokens FROM usage")}
    for job, told in answers.items():
        assert usage.get(job) == told, (seed, job)
    for job, view in views.items():
        if view["status"] == "completed":
            assert usage.get(job) == (view["usage"]["prompt_tokens"], view["usage"]["completion_tokens"]), (seed, job)
    assert rows(tmp_path, "PRAGMA integrity_check") == [("ok",)]


def test_a_stream_that_was_shown_is_interrupted_and_not_run_again(tmp_path: Path) -> None:
    with running_queen(home=tmp_path) as queen:
        slow_worker(queen)
        shown = post_job(queen, chat("word " * 1000, stream=True))
        with following(queen, shown) as found:
            assert next(event for event in found if event.name == "delta")
            whole = post_job(queen, chat("a b c"))
            until(lambda: call(queen, "GET", f"/v1/jobs/{whole}")[2]["status"] == "running", "the other job to begin")
            kill_everything(queen)
    with running_queen(home=tmp_path) as queen:
        assert ended(queen, whole)["response"]["choices"][0]["message"]["content"] == "a b c"
        view = ended(queen, shown)
        assert (view["status"], view["error"]["code"]) == ("interrupted", "interrupted")
        [last] = events(queen, shown, last_id=7)
        assert (last.id, last.name, last.data["status"]) == (8, "error", "interrupted")
