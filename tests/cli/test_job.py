"""`rbee job`: list, show, follow, cancel."""

from __future__ import annotations

import json

import pytest

from rbee.cli.main import main
from rbee.client import Client
from rbee.testing.programs import RunningQueen, until
from rbee.wire.fleet import SpawnWorker, WorkerReport
from rbee.wire.jobs import JobCreated, JobStatus, JobView

CHAT = "/v1/chat/completions"


@pytest.fixture
def job(queen: RunningQueen) -> str:
    """Return the id of a job that is over."""
    client: Client = queen.client
    body = {"model": "echo", "messages": [{"role": "user", "content": "a b c"}]}
    made = client.post("/v1/jobs", {"endpoint": CHAT, "body": body, "metadata": {"for": "\x1b[31mred"}}, JobCreated)
    until(lambda: client.get(f"/v1/jobs/{made.job_id}", JobView).status is JobStatus.COMPLETED, "the job to end")
    return made.job_id


def rbee(queen: RunningQueen, *words: str) -> int:
    return main(["--queen", queen.url, "--api-key", queen.record.token, "job", *words])


def test_list_show_and_logs(queen: RunningQueen, job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rbee(queen, "list", "--status", "completed", "-n", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["data"][0]["id"] == job
    assert rbee(queen, "list") == 0
    assert job in capsys.readouterr().out
    assert rbee(queen, "show", job) == 0
    out = capsys.readouterr().out
    assert '"content": "a b c"' in out
    assert "completed" in out
    assert "\x1b[31m" not in out
    assert rbee(queen, "show", job, "--json") == 0
    assert json.loads(capsys.readouterr().out)["response"]["choices"]
    assert rbee(queen, "logs", job) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["status"] == "queued"
    assert lines[-1]["status"] == "completed"
    assert rbee(queen, "logs", job, "--after", str(len(lines) - 1)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_cancel_and_what_is_not_there(queen: RunningQueen, job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rbee(queen, "cancel", job) == 0
    assert "completed" in capsys.readouterr().err
    for verb in ("show", "cancel", "logs"):
        assert rbee(queen, verb, "job_none") == 4
        assert "There is no job" in capsys.readouterr().err


def test_logs_of_a_job_that_failed_exit_with_1(queen: RunningQueen) -> None:
    body = {"model": "nobody-has-this", "messages": [{"role": "user", "content": "x"}]}
    made = queen.client.post("/v1/jobs", {"endpoint": CHAT, "body": body}, JobCreated)
    assert rbee(queen, "logs", made.job_id) == 1


def test_a_job_that_runs_shows_where(queen: RunningQueen, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = SpawnWorker(model="echo", backend="echo", name="slow-echo", options={"delay_ms": "200"})
    queen.client.post(f"/v1/hives/{queen.status().hives[0].hive}/workers", wanted, WorkerReport)
    until(lambda: any(w.name == "slow-echo" and w.state == "ready" for h in queen.status().hives for w in h.workers),
          "the worker")  # fmt: skip
    body = {"model": "echo", "messages": [{"role": "user", "content": "word " * 200}], "stream": True}
    made = [queen.client.post("/v1/jobs", {"endpoint": CHAT, "body": body}, JobCreated).job_id for _ in range(2)]
    for one in made:
        until(lambda one=one: queen.client.get(f"/v1/jobs/{one}", JobView).worker, "it to be placed")  # type: ignore[misc]
        assert rbee(queen, "show", one) == 0
        assert "/" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("worker"))
        assert rbee(queen, "cancel", one) == 0
    assert rbee(queen, "show", made[0]) == 0
    assert "about " in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tokens"))
    queen.client.delete(f"/v1/hives/{queen.status().hives[0].hive}/workers/slow-echo", WorkerReport)


def test_what_is_no_id_is_said_in_the_words_of_the_verb(
    queen: RunningQueen, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for odd in ("../../etc", "", "a b", "no\nbody"):
        assert rbee(queen, "show", odd) == 4
        assert capsys.readouterr().err.endswith("try: rbee job list\n")
    assert rbee(queen, "list", "--after", "zzz") == 2
    assert rbee(queen, "list", "--model", "nobody") == 0
    assert "no such jobs" in capsys.readouterr().err
    answer = queen.client.send("POST", CHAT, {"model": "echo", "messages": [{"role": "user", "content": "x"}]})
    answer.read()
    assert rbee(queen, "logs", answer.headers["x-rbee-job"]) == 4
    assert "try: rbee job show" in capsys.readouterr().err
