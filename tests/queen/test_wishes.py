"""What clients say in headers holds for jobs that nobody waits for, too; what they say of priority reaches scripts."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_calls import CHAT, call, ended
from queen_rig import FleetFolder, until_state

from rbee.queen.keys import KeyStore
from rbee.queen.policy import Policy
from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, running_queen, until

SCRIPT = """
fn route_task(task, workers) {
    if task.priority == "high" || task.tags.contains("urgent") { return workers.filter(|w| w.hive == "cloud").first(); }
    if task.priority == "low" { return workers.filter(|w| w.hive == "attic").first(); }
    let home = workers.filter(|w| w.hive == "home").first();
    if home == () { workers.first() } else { home }
}
"""


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


@pytest.fixture
def inventory(fleet: FleetFolder, server: RunningServer) -> FleetFolder:
    """Return an inventory of three hosts with the same model, and a script."""
    line = f"url={server.url} model=honey slots=1"
    fleet.write(
        home=["HivePort none", "Region eu", f"Worker w {line}"],
        cloud=["HivePort none", "Region us", f"Worker w {line}"],
        attic=["HivePort none", "Region asia", f"Worker w {line}"],
    )
    (fleet.folder / "scheduler.rhai").write_text(SCRIPT)
    return fleet


@pytest.fixture
def queen(inventory: FleetFolder) -> Iterator[RunningQueen]:
    with running(inventory) as started:
        yield started


def running(inventory: FleetFolder, **more: Any) -> Any:
    return running_queen("--no-hive", "--inventory", str(inventory.folder), **more)


def known(queen: RunningQueen) -> RunningQueen:
    """Wait until every server is known."""
    for name in ("home", "cloud", "attic"):
        until_state(queen, name, "ready")
    return queen


def chat(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": "honey", "messages": [{"role": "user", "content": text}], **fields}


def job(queen: RunningQueen, body: dict[str, Any] | None = None, *, priority: str = "normal", **headers: str) -> str:
    asked = {"endpoint": CHAT, "body": body or chat(), "priority": priority}
    status, _, made = call(queen, "POST", "/v1/jobs", asked, **headers)
    assert status == 202, made
    return str(made["job_id"])


def test_region_hive_tags_and_priority_of_a_job_hold_when_it_runs(queen: RunningQueen) -> None:
    known(queen)
    assert ended(queen, job(queen))["worker"] == "home/w"
    assert ended(queen, job(queen, X_Rbee_Region="us"))["worker"] == "cloud/w"
    assert ended(queen, job(queen, X_Rbee_Hive="attic"))["worker"] == "attic/w"
    assert ended(queen, job(queen, X_Rbee_Tags="blue, urgent"))["worker"] == "cloud/w"
    high, low = ended(queen, job(queen, priority="high")), ended(queen, job(queen, priority="low"))
    assert (high["worker"], high["priority"]) == ("cloud/w", "interactive")
    assert (low["worker"], low["priority"]) == ("attic/w", "batch")


def test_a_request_and_a_task_say_their_priority_in_the_words_of_a_script(queen: RunningQueen) -> None:
    known(queen)

    def place(path: str, body: dict[str, Any], **headers: str) -> str:
        status, told, answer = call(queen, "POST", path, body, **headers)
        assert status == 200, answer
        return told["x-rbee-worker"]

    assert place(CHAT, chat()) == "home/w"
    assert place(CHAT, chat(priority="high")) == "cloud/w"
    assert place(CHAT, chat(), X_Rbee_Priority="low") == "attic/w"
    task = {"model": "honey", "prompt": "hello there", "stream": False}
    assert place("/v2/tasks", task) == "home/w"
    assert place("/v2/tasks", task | {"priority": "high"}) == "cloud/w"
    assert place("/v2/tasks", task, X_Rbee_Priority="high") == "cloud/w"
    assert place("/v2/tasks", task, X_Rbee_Region="us") == "cloud/w"
    assert place("/v2/tasks", task, X_Rbee_Tags="urgent") == "cloud/w"
    assert call(queen, "POST", CHAT, chat(), X_Rbee_Priority="urgent")[0] == 400


def test_a_word_for_more_than_a_key_may_have_is_not_shown() -> None:
    assert Policy().heard("high") == ("interactive", "high")
    assert Policy().heard("low") == ("batch", "low")
    assert Policy(priority="normal").heard("high") == ("normal", "normal")
    assert Policy(priority="batch").heard("low") == ("batch", "low")
    assert Policy(priority="batch").heard("normal") == ("batch", "batch")


@pytest.mark.parametrize("path", ["/v1/jobs", "/v2/tasks", "/v1/batches"])
@pytest.mark.parametrize(
    "wrong", [("X_Rbee_Region", "a b"), ("X_Rbee_Hive", "../x"), ("X_Rbee_Tags", "x" * 65), ("X_Request_Timeout", "-1")]
)
def test_a_header_that_makes_no_sense_is_refused_at_once(
    queen: RunningQueen, path: str, wrong: tuple[str, str]
) -> None:
    body = {
        "/v1/jobs": {"endpoint": CHAT, "body": chat()},
        "/v2/tasks": {"model": "honey", "prompt": "x"},
        "/v1/batches": {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h"},
    }[path]
    status, _, answer = call(queen, "POST", path, body, **{wrong[0]: wrong[1]})
    assert status == 400
    assert answer["error"]["param"].replace("-", "_") == wrong[0]


def test_the_lines_of_a_batch_stay_in_their_region(queen: RunningQueen) -> None:
    known(queen)
    batch = start_batch(queen, 4, X_Rbee_Region="asia")
    until(lambda: call(queen, "GET", f"/v1/batches/{batch}")[2]["status"] == "completed", "the batch to end")
    jobs = call(queen, "GET", "/v1/jobs?model=honey")[2]["data"]
    assert [one["worker"] for one in jobs] == ["attic/w"] * 4


def test_a_batch_expires_when_its_time_is_over(queen: RunningQueen, server: RunningServer) -> None:
    known(queen)
    server.behave(answer="hang")
    began = time.time()
    batch = start_batch(queen, 3, X_Request_Timeout="2")
    until(lambda: call(queen, "GET", f"/v1/batches/{batch}")[2]["status"] == "expired", "the batch to expire")
    view = call(queen, "GET", f"/v1/batches/{batch}")[2]
    assert view["expires_at"] <= began + 4
    assert view["request_counts"] == {"total": 3, "completed": 0, "failed": 3}
    until(lambda: server.told().in_flight == 0 or server.told().jobs > 0, "the server to be left alone")


def test_a_job_ends_at_its_deadline_whether_it_runs_or_waits(queen: RunningQueen, server: RunningServer) -> None:
    known(queen)
    server.behave(answer="hang")
    blocker = job(queen, X_Rbee_Hive="home")
    until(lambda: server.told().jobs == 1, "the first job to run")
    waiting = job(queen, X_Request_Timeout="1", X_Rbee_Hive="home")
    running_one = job(queen, X_Request_Timeout="1", X_Rbee_Hive="cloud")
    for one in (waiting, running_one):
        view = ended(queen, one)
        assert (view["status"], view["error"]["code"]) == ("failed", "deadline_exceeded")
        assert view["ended_at"] - view["created_at"] >= 1.0
        _, _, told = call(queen, "GET", f"/v1/jobs/{one}")
        assert told["error"]["message"].endswith("(X-Request-Timeout)")
    assert call(queen, "GET", f"/v1/jobs/{blocker}")[2]["status"] == "running"


def test_wishes_and_deadline_outlive_the_queen(inventory: FleetFolder, server: RunningServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    server.behave(answer="hang")
    with running(inventory, home=home) as first:
        known(first)
        late = job(first, X_Request_Timeout="3", X_Rbee_Hive="home")
        there = job(first, X_Rbee_Region="us", X_Rbee_Tags="urgent", priority="low")
        until(lambda: server.told().jobs == 2, "both to run")
        kill(first)
    with running(inventory, home=home) as second:
        known(second)
        view = ended(second, late)
        assert (view["status"], view["error"]["code"]) == ("failed", "deadline_exceeded")
        server.behave()
        until(lambda: server.told().jobs >= 3, "the other to run again")
        # It hangs at the server since before that changed its manner.
        kill(second)
    with running(inventory, home=home) as third:
        known(third)
        view = ended(third, there)
        assert (view["status"], view["worker"], view["priority"]) == ("completed", "cloud/w", "batch")


def test_what_is_left_of_a_keys_rates_is_told_by_jobs_tasks_and_refusals(queen: RunningQueen) -> None:
    known(queen)
    store = KeyStore(queen.home / "state" / "keys.sqlite")
    _, key = store.create("limited", policy=Policy(requests_per_minute=2))
    headers = {"Authorization": f"Bearer {key}"}
    task = {"model": "honey", "prompt": "x", "stream": False}
    _, told, _ = call(queen, "POST", "/v1/jobs", {"endpoint": CHAT, "body": chat()}, **headers)
    assert told["x-ratelimit-limit-requests"] == "2"
    job_path = told["location"]
    until(lambda: call(queen, "GET", job_path, **headers)[2]["status"] == "completed", "the job to end")
    status, told, _ = call(queen, "POST", "/v2/tasks", task, **headers)
    assert (status, told["x-ratelimit-remaining-requests"]) == (200, "0")
    for path, body in (("/v2/tasks", task), (CHAT, chat())):
        status, told, _ = call(queen, "POST", path, body, **headers)
        assert status == 429
        assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("2", "0")
        assert "x-ratelimit-reset-requests" in told
        assert int(told["retry-after"]) >= 1


def kill(queen: RunningQueen) -> None:
    """End a queen's processes without a word."""
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        try:
            mine = f"RBEE_HOME={queen.home}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mine and pid != os.getpid():
            os.kill(pid, signal.SIGKILL)
    queen.process.wait()


def start_batch(queen: RunningQueen, count: int, **headers: str) -> str:
    """Start a batch of so many chats."""
    lines = "".join(
        json.dumps({"custom_id": str(n), "method": "POST", "url": CHAT, "body": chat(f"number {n}")}) + "\n"
        for n in range(count)
    )
    form = (
        '--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{lines}\r\n--x--\r\n'
    )
    file = json.loads(upload(queen, form.encode()))
    asked = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
    status, _, made = call(queen, "POST", "/v1/batches", asked, **headers)
    assert status == 200, made
    return str(made["id"])


def upload(queen: RunningQueen, form: bytes) -> bytes:
    from urllib.request import Request, urlopen

    request = Request(f"{queen.url}/v1/files", form, {"Content-Type": "multipart/form-data; boundary=x"})
    with urlopen(request) as answer:
        data: bytes = answer.read()
    return data
