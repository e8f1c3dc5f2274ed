"""Calls to a queen's jobs, as a client makes them."""

from __future__ import annotations

import http.client
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from rbee.queen.keys import INFERENCE, KeyStore
from rbee.queen.policy import Policy
from rbee.testing.programs import RunningQueen, until
from rbee.wire.fleet import SpawnWorker, WorkerReport

CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
FINAL = {"completed", "failed", "cancelled", "interrupted"}


class Event(NamedTuple):
    """One server-sent event."""

    id: int
    name: str
    data: dict[str, Any]


def call(
    queen: RunningQueen, method: str, path: str, value: Any = None, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Send one request and return the status, the headers and the JSON of its answer."""
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    with closing(connection):
        body = None if value is None else json.dumps(value).encode()
        connection.request(method, path, body, {name.replace("_", "-"): told for name, told in headers.items()})
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, {name.lower(): told for name, told in answer.getheaders()}, json.loads(text or b"null")


def chat(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    """Return a chat request to the echo engine."""
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **fields}


def post_job(queen: RunningQueen, body: dict[str, Any], *, key: str = "", **fields: Any) -> str:
    """Create a job and return its id."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    status, _, made = call(queen, "POST", "/v1/jobs", {"endpoint": CHAT, "body": body, **fields}, **headers)
    assert status == 202, made
    return str(made["job_id"])


def ended(queen: RunningQueen, job_id: str, key: str = "") -> dict[str, Any]:
    """Wait until a job is over and return it."""
    until(lambda: job_view(queen, job_id, key)["status"] in FINAL, f"{job_id} to end")
    return job_view(queen, job_id, key)


def job_view(queen: RunningQueen, job_id: str, key: str = "") -> dict[str, Any]:
    """Return a job as it is at present."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    code, _, view = call(queen, "GET", f"/v1/jobs/{job_id}", **headers)
    assert code == 200, view
    found: dict[str, Any] = view
    return found


@contextmanager
def following(queen: RunningQueen, job_id: str, last_id: int = 0) -> Iterator[Iterator[Event]]:
    """Follow a job's events as they come."""
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    with closing(connection):
        headers = {"Last-Event-ID": str(last_id)} if last_id else {}
        connection.request("GET", f"/v1/jobs/{job_id}/stream", headers=headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        assert answer.getheader("Content-Type", "").startswith("text/event-stream")
        yield _events(answer)


def events(queen: RunningQueen, job_id: str, last_id: int = 0) -> list[Event]:
    """Return a job's events to their end."""
    with following(queen, job_id, last_id) as found:
        return list(found)


def _events(answer: http.client.HTTPResponse) -> Iterator[Event]:
    fields: dict[str, str] = {}
    for line in iter(answer.readline, b""):
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name:
            fields[name] = value
        elif "data" in fields:
            yield Event(int(fields["id"]), fields["event"], json.loads(fields["data"]))
            fields = {}


def text_of(found: list[Event]) -> str:
    """Return the text that the deltas of a streamed chat hold."""
    chunks = [event.data for event in found if event.name == "delta"]
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


def make_key(queen: RunningQueen, name: str, tenant: str = "") -> str:
    """Make an API key of this queen and return its secret."""
    store = KeyStore(queen.home / "state" / "keys.sqlite")
    return store.create(name, scopes=frozenset({INFERENCE}), policy=Policy(tenant=tenant))[1]


def rows(home: Path, query: str) -> list[tuple[Any, ...]]:
    """Return rows of the records of a queen that has ended."""
    with closing(sqlite3.connect(home / "state" / "records" / "records.sqlite")) as db:
        return db.execute(query).fetchall()


def slow_worker(queen: RunningQueen, delay_ms: int = 100) -> None:
    """Start an echo worker that takes so long for a word."""
    wanted = SpawnWorker(model="echo", backend="echo", options={"delay_ms": str(delay_ms)})
    queen.client.post(f"/v1/hives/{queen.status().hives[0].hive}/workers", wanted, WorkerReport)
    until(lambda: any(w.state == "ready" for h in queen.status().hives for w in h.workers), "the worker to be ready")
