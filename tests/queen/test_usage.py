"""Every token is counted: those that an engine tells of, and an estimate, marked as one, of those it does not."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from job_calls import CHAT, call, ended, events, post_job, rows
from queen_rig import FleetFolder, until_state

from rbee.client import Client
from rbee.queen.keys import KeyStore
from rbee.queen.policy import Policy
from rbee.queen.records import SCHEMA
from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, running_queen, until

WORDS = 25


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        running.behave(usage="asked")
        yield running


@pytest.fixture
def inventory(fleet: FleetFolder, server: RunningServer) -> FleetFolder:
    fleet.write(shed=["HivePort none", f"Worker w url={server.url} model=honey"])
    return fleet


@pytest.fixture
def queen(inventory: FleetFolder) -> Iterator[RunningQueen]:
    with running_queen("--no-hive", "--inventory", str(inventory.folder)) as running:
        until_state(running, "shed", "ready")
        yield running


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "honey", "messages": [{"role": "user", "content": "word " * WORDS}], **fields}


def streamed(queen: RunningQueen, key: str = "", *, chunks: int = 1000, **fields: Any) -> str:
    """Read some of a stream's reads, leave, and return the job's id."""
    with closing(Client(queen.url, token=key)) as client:
        answer = client.send("POST", CHAT, chat(stream=True, **fields))
        while chunks and answer.next(60.0):
            chunks -= 1
        answer.close()
        return answer.headers["x-rbee-job"]


def usage(queen: RunningQueen, job: str) -> dict[str, Any]:
    told: dict[str, Any] = ended(queen, job)["usage"]
    return told


def test_what_an_engine_tells_is_taken_as_it_is(queen: RunningQueen) -> None:
    exact = {"prompt_tokens": WORDS, "completion_tokens": WORDS, "estimated": False}
    assert usage(queen, streamed(queen, stream_options={"include_usage": True})) == exact
    _, told, _ = call(queen, "POST", CHAT, chat())
    assert usage(queen, told["x-rbee-job"]) == exact


def test_a_stream_that_tells_nothing_is_estimated_and_says_so(queen: RunningQueen) -> None:
    estimate = {"prompt_tokens": 5 * WORDS // 4, "completion_tokens": WORDS, "estimated": True}
    assert usage(queen, streamed(queen)) == estimate
    job = post_job(queen, chat(stream=True))
    assert usage(queen, job) == estimate
    assert events(queen, job)[-1].data["usage"] == estimate


def test_a_whole_answer_that_tells_nothing_is_estimated(queen: RunningQueen, server: RunningServer) -> None:
    server.behave(usage="never")
    _, told, answer = call(queen, "POST", CHAT, chat())
    found = usage(queen, told["x-rbee-job"])
    assert found["estimated"]
    assert found["completion_tokens"] == len(json.dumps(answer, separators=(",", ":"))) // 4
    embeddings = {"model": "honey", "input": "word " * WORDS}
    _, told, _ = call(queen, "POST", "/v1/embeddings", embeddings)
    assert usage(queen, told["x-rbee-job"]) == {
        "prompt_tokens": 5 * WORDS // 4, "completion_tokens": 0, "estimated": True
    }  # fmt: skip


def test_a_client_that_leaves_has_used_what_came(queen: RunningQueen, server: RunningServer) -> None:
    server.behave(usage="asked", word_s=0.05)
    found = usage(queen, streamed(queen, chunks=3))
    assert found["estimated"]
    assert 2 <= found["completion_tokens"] < WORDS
    assert found["prompt_tokens"] == 5 * WORDS // 4


def test_a_budget_holds_for_streams_that_tell_nothing(queen: RunningQueen) -> None:
    store = KeyStore(queen.home / "state" / "keys.sqlite")
    _, key = store.create("small", policy=Policy(tokens_per_day=150))
    headers = {"Authorization": f"Bearer {key}"}
    streamed(queen, key)
    # The prompt's 31 and the answer's 25 are gone, and again: what is left does not pay for a third.
    streamed(queen, key)
    status, _, refused = call(queen, "POST", CHAT, chat(max_tokens=WORDS), **headers)
    assert (status, refused["error"]["code"]) == (429, "insufficient_quota")


def test_the_records_of_an_earlier_version_are_taken_over(inventory: FleetFolder, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "state" / "records"
    folder.mkdir(parents=True)
    with closing(sqlite3.connect(folder / "records.sqlite")) as db:
        db.executescript(SCHEMA)
        db.execute(
            "INSERT INTO jobs (id, owner, key, kind, endpoint, model, status, created_at, ended_at)"
            " VALUES ('job_1', 'key:local', 'local', 'request', ?, 'honey', 'completed', 1e9, 4e9)",
            (CHAT,),
        )
        db.commit()
    home = tmp_path / "home"
    with running_queen("--no-hive", "--inventory", str(inventory.folder), home=home) as queen:
        until_state(queen, "shed", "ready")
        assert call(queen, "GET", "/v1/jobs/job_1")[2]["usage"]["estimated"] is False
        job = streamed(queen)
        until(lambda: call(queen, "GET", f"/v1/jobs/{job}")[0] == 200, "the job to be recorded")
        ended(queen, job)
    assert rows(home, "SELECT estimated, completion_tokens FROM usage") == [(1, WORDS)]
