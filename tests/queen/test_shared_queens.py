"""Two queens of two server processes each, over one Redis: they count together, and know each other's jobs."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from job_calls import CHAT, FINAL, call, chat, ended, events, job_view, post_job
from redis_rig import RunningRedis, inventory, running_redis

from rbee.queen.keys import KeyStore
from rbee.queen.link import TIMEOUT_S
from rbee.queen.policy import Policy
from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, running_queen, until

PROCESSES = 4


@dataclass
class Hives:
    """Two queens over one Redis and one server; each has the same keys."""

    queens: list[RunningQueen]
    redis: RunningRedis
    server: RunningServer
    store: KeyStore
    homes: list[Path]

    def key(self, **limits: Any) -> str:
        """Make a key that both queens know."""
        _, secret = self.store.create("test", policy=Policy(**limits))
        for home in self.homes[1:]:
            shutil.copy(self.homes[0] / "state" / "keys.sqlite", home / "state" / "keys.sqlite")
        return secret

    def all_at_once(self, count: int, ask: Callable[[RunningQueen], Any], threads: int = 24) -> list[Any]:
        """Ask the queens in turn, many at once."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda number: ask(self.queens[number % len(self.queens)]), range(count)))

    def statuses(self, key: str, count: int) -> Counter[int]:
        """Return with which statuses so many requests under a key ended, sent from all sides at once."""
        return Counter(self.all_at_once(count, lambda queen: ask(queen, key)))

    def owners(self) -> set[str]:
        """Return the names of all processes."""
        names: set[str] = set()
        for queen in self.queens:
            view = status(queen)
            names |= {f"{view['shared_state']['queen']}{process['slot']}" for process in view["processes"]}
        return names


def ask(queen: RunningQueen, key: str = "", text: str = "one two three") -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return call(queen, "POST", CHAT, chat(text), **headers)[0]


def status(queen: RunningQueen) -> dict[str, Any]:
    view: dict[str, Any] = queen.client.get("/v1/orchestrator/status", dict[str, Any])
    return view


def until_of(queen: RunningQueen, holds: Callable[[RunningQueen], object], what: str) -> None:
    """Wait until something holds for a queen."""
    until(lambda: holds(queen), what)


@contextlib.contextmanager
def running_hives(folder: Path, *, queens: int = 2, processes: int = 2, more: str = "") -> Iterator[Hives]:
    """Run queens over one Redis and one server; `more` are further lines of the inventory's host."""
    with ExitStack() as stack:
        redis, server = stack.enter_context(running_redis()), stack.enter_context(running_server("echo"))
        homes = [folder / f"queen-{number}" for number in range(queens)]
        for home in homes:
            (home / "state").mkdir(parents=True, mode=0o700)
        store = KeyStore(homes[0] / "state" / "keys.sqlite")
        hives = Hives([], redis, server, store, homes)
        hives.key()
        words = ["--no-hive", "--inventory", str(inventory(folder / "inventory", more, w=server.url))]
        words += ["--processes", str(processes), "--state", redis.url]
        hives.queens = [stack.enter_context(running_queen(*words, home=home)) for home in homes]
        for queen in hives.queens:
            until_of(queen, lambda one: len(status(one)["processes"]) == processes, "every process to answer")
            until_of(queen, lambda one: all(p["state_reached"] for p in status(one)["processes"]), "Redis")
            until_of(queen, lambda one: {ask(one) for _ in range(10)} == {200}, "the server to be known")
            until_of(
                queen, lambda one: {p["queens"] for p in status(one)["processes"]} == {queens - 1}, "the queens to meet"
            )
        yield hives


@pytest.fixture(scope="module")
def hives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hives]:
    """Return two queens, shared by the tests that leave them well."""
    with running_hives(tmp_path_factory.mktemp("hives")) as running:
        yield running


def server_processes(queen: RunningQueen) -> list[int]:
    return [process["pid"] for process in status(queen)["processes"]]


def test_a_rate_is_exact_whoever_is_asked(hives: Hives) -> None:
    key = hives.key(requests_per_day=40)
    assert hives.statuses(key, 120) == {200: 40, 429: 80}


def test_jobs_at_once_are_exact_whoever_is_asked(hives: Hives) -> None:
    key = hives.key(concurrency=3)
    hives.server.behave(word_s=1.0)
    try:
        assert hives.statuses(key, 24) == {200: 3, 429: 21}
    finally:
        hives.server.behave()
    # One after another never trips over the one before, though each may be at another process.
    assert {ask(queen, key) for _ in range(20) for queen in hives.queens} == {200}


def test_a_job_is_found_and_followed_everywhere(hives: Hives) -> None:
    ids = hives.all_at_once(24, lambda queen: post_job(queen, chat("some words", stream=True)))
    assert {job.rpartition("_")[2] for job in ids} == hives.owners()
    for job in ids:
        for queen in hives.queens:
            assert ended(queen, job)["status"] == "completed"
            assert [event.name for event in events(queen, job, last_id=2)][-1] == "done"


def test_a_list_is_one_over_all(hives: Hives) -> None:
    key = hives.key(tenant="lists")
    ids = sorted(hives.all_at_once(25, lambda queen: post_job(queen, chat(), key=key)), reverse=True)
    for queen in hives.queens:
        found, after = [], ""
        while True:
            code, headers, page = call(queen, "GET", f"/v1/jobs?limit=10{after}", Authorization=f"Bearer {key}")
            assert code == 200
            assert "x-rbee-incomplete" not in headers
            found += [job["id"] for job in page["data"]]
            after = f"&after={page['last_id']}"
            if not page["has_more"]:
                break
        assert found == ids


def test_a_job_is_cancelled_from_anywhere(hives: Hives) -> None:
    hives.server.behave(word_s=0.2)
    try:
        ids = hives.all_at_once(8, lambda queen: post_job(queen, chat("word " * 1000, stream=True)))
        until(lambda: hives.server.told().in_flight == len(ids), "the jobs to run")
        for number, job in enumerate(ids):
            queen = hives.queens[number // 4]
            assert call(queen, "DELETE", f"/v1/jobs/{job}")[2]["status"] == "cancelled"
            assert {job_view(each, job)["status"] for each in hives.queens} == {"cancelled"}
        until(lambda: hives.server.told().in_flight == 0, "the server to be left")
    finally:
        hives.server.behave()


def test_a_request_that_a_client_waits_for_is_cancelled_from_anywhere(hives: Hives) -> None:
    hives.server.behave(word_s=30)
    first, second = hives.queens
    try:
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(call, first, "POST", CHAT, chat("for the cancelled one", stream=False))
            until(lambda: live(second), "the request to be listed")
            [job] = live(second)
            assert call(second, "DELETE", f"/v1/jobs/{job}")[0] == 200
            assert waits.result()[0] == 499
    finally:
        hives.server.behave()


def live(queen: RunningQueen) -> list[str]:
    return [job["id"] for job in call(queen, "GET", "/v1/jobs?status=running")[2]["data"]]


def test_a_hundred_requests_under_one_idempotency_key_run_once(hives: Hives) -> None:
    before = hives.server.told().jobs
    answers = hives.all_at_once(
        100, lambda queen: call(queen, "POST", CHAT, chat("only once"), **{"Idempotency-Key": "one"}), threads=50
    )
    assert {code for code, _, _ in answers} == {200}
    assert len({headers["x-rbee-job"] for _, headers, _ in answers}) == 1
    assert hives.server.told().jobs == before + 1
    made = hives.all_at_once(20, lambda queen: call(
        queen, "POST", "/v1/jobs", {"endpoint": CHAT, "body": chat("a job once")}, **{"Idempotency-Key": "two"}
    ))  # fmt: skip
    assert len({answer["job_id"] for _, _, answer in made}) == 1
    code, _, _ = call(hives.queens[1], "POST", CHAT, chat("something else"), **{"Idempotency-Key": "one"})
    assert code == 409


def test_files_and_batches_are_found_everywhere(hives: Hives) -> None:
    first, second = hives.queens
    lines = [
        json.dumps({"custom_id": f"n{number}", "method": "POST", "url": CHAT, "body": chat(f"line {number}")})
        for number in range(5)
    ]
    file = upload(first, "\n".join(lines).encode())
    wanted = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    code, _, made = call(second, "POST", "/v1/batches", wanted)
    assert code == 200, made
    # A batch is where its file is.
    assert made["id"].rpartition("_")[2] == file.rpartition("_")[2]
    until(lambda: call(second, "GET", f"/v1/batches/{made['id']}")[2]["status"] == "completed", "the batch to end")
    done = call(first, "GET", f"/v1/batches/{made['id']}")[2]
    for queen in hives.queens:
        answers = content(queen, done["output_file_id"]).splitlines()
        assert [json.loads(line)["custom_id"] for line in answers] == [f"n{number}" for number in range(5)]
        files = [one["id"] for one in call(queen, "GET", "/v1/files")[2]["data"]]
        assert files[:2] == [done["output_file_id"], file]
        assert call(queen, "GET", "/v1/batches")[2]["data"][0]["id"] == made["id"]
    assert call(second, "DELETE", f"/v1/files/{file}")[0] == 200
    assert {call(queen, "GET", f"/v1/files/{file}")[0] for queen in hives.queens} == {404}


def upload(queen: RunningQueen, data: bytes) -> str:
    form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    form += b'--b\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n' + data + b"\r\n--b--\r\n"
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/files", form, {"Content-Type": "multipart/form-data; boundary=b"})
        return str(json.loads(connection.getresponse().read())["id"])


def content(queen: RunningQueen, file: str) -> bytes:
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", f"/v1/files/{file}/content")
        return connection.getresponse().read()


def test_one_page_of_metrics_for_all_processes(hives: Hives) -> None:
    first = hives.queens[0]
    before = counted(first)
    for _ in range(20):
        assert ask(first) == 200
    until(lambda: counted(first) == before + 20, "every process' jobs to be counted")
    page = metrics(first)
    assert "rbee_shared_state_up 1.0" in page
    assert page.count("# TYPE rbee_jobs_total ") == 1


def metrics(queen: RunningQueen) -> str:
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()


def counted(queen: RunningQueen) -> float:
    lines = metrics(queen).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("rbee_jobs_total{"))


def test_nobody_may_pose_as_a_peer(hives: Hives) -> None:
    forged = {"X-Rbee-Peer": "guess", "X-Rbee-Peer-Caller": "eyJpZCI6Im9wZXJhdG9yIn0="}
    for path in ("/v1/jobs", "/metrics", "/v1/orchestrator/process"):
        assert call(hives.queens[0], "GET", path, **forged)[0] == 401


def test_a_worker_that_fails_is_left_out_by_all(tmp_path: Path) -> None:
    with running_server("pair") as bad, running_server("pair") as good:
        bad.behave(answer="error")
        pair = f"  Worker bad model=pair url={bad.url}\n  Worker good model=pair url={good.url}\n"
        with running_hives(tmp_path, more=pair) as hives:
            answers = hives.all_at_once(80, lambda queen: call(queen, "POST", CHAT, {**chat(), "model": "pair"}), 2)
            assert {code for code, _, _ in answers} == {200}
            # Five failures in all, some more that were on their way, and a probe from time to time; alone, each process
            # would have sent five.
            assert 5 <= bad.told().jobs < 5 * PROCESSES


def test_a_killed_process_costs_only_the_connections_that_it_had(tmp_path: Path) -> None:
    with running_hives(tmp_path) as hives:
        first = hives.queens[0]
        held, unlimited = hives.key(concurrency=4), hives.key(requests_per_day=100_000)
        hives.server.behave(word_s=0.02)
        before = counted(first)
        accepted: list[str] = []
        failures: list[int] = []
        stop = threading.Event()

        def make(queen: RunningQueen) -> None:
            while not stop.is_set():
                # A connection that breaks is the killed process'; every answer is a good one.
                with contextlib.suppress(OSError, http.client.HTTPException):
                    code, _, made = call(
                        queen, "POST", "/v1/jobs", {"endpoint": CHAT, "body": chat("a b c")},
                        Authorization=f"Bearer {unlimited}",
                    )  # fmt: skip
                    accepted.append(made["job_id"]) if code == 202 else failures.append(code)
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if (code := ask(queen, unlimited)) != 200:
                        failures.append(code)
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if (code := ask(queen, held)) not in (200, 429):
                        failures.append(code)

        makers = [threading.Thread(target=make, args=(queen,)) for queen in hives.queens for _ in range(4)]
        for maker in makers:
            maker.start()
        until(lambda: len(accepted) > 40, "some jobs")
        victim = server_processes(first)[1]
        os.kill(victim, signal.SIGKILL)
        count = len(accepted)
        until(lambda: len(accepted) > count + 40, "more jobs")
        stop.set()
        for maker in makers:
            maker.join()
        assert failures == []
        until(lambda: len(server_processes(first)) == 2 and victim not in server_processes(first), "its successor")
        views = [ended(hives.queens[1], job, unlimited) for job in accepted]
        assert {view["status"] for view in views} == {"completed"}
        assert each_is_recorded_once(hives.homes, accepted)
        hives.server.behave(word_s=1.0)
        # What the killed process held is free again, and no more than that.
        assert hives.statuses(held, 24) == {200: 4, 429: 20}
        # Counters of the dead process go on, or Prometheus would count everything again.
        assert counted(first) >= before


def each_is_recorded_once(homes: list[Path], jobs: list[str]) -> bool:
    """Return True when each job is in one database, and its usage too."""
    found: Counter[str] = Counter()
    usage: Counter[str] = Counter()
    for path in (path for home in homes for path in (home / "state" / "records").rglob("records.sqlite")):
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            found.update(row[0] for row in db.execute("SELECT id FROM jobs"))
            usage.update(row[0] for row in db.execute("SELECT job FROM usage"))
    return all(found[job] == 1 and usage[job] == 1 for job in jobs)


def test_redis_may_go_and_come_back(tmp_path: Path) -> None:
    with running_hives(tmp_path) as hives:
        key = hives.key(requests_per_day=60)
        for queen in hives.queens:
            assert ask(queen, key) == 200
        hives.redis.kill()
        for queen in hives.queens:
            until_of(queen, lambda one: not any(p["state_reached"] for p in status(one)["processes"]), "the loss")
            code, _, health = call(queen, "GET", "/health")
            assert (code, health["shared_state"]) == (200, "away")
            assert any("shared state" in problem["where"] for problem in status(queen)["problems"])
            assert "rbee_shared_state_up 0.0" in metrics(queen)
        # Jobs are found and limits hold all the same, the latter for each process by itself.
        assert hives.statuses(key, 20) == {200: 20}
        job = post_job(hives.queens[0], chat())
        assert ended(hives.queens[1], job)["status"] == "completed"
        hives.redis.start()
        for queen in hives.queens:
            until_of(queen, lambda one: all(p["state_reached"] for p in status(one)["processes"]), "the return")
        assert hives.statuses(key, 60) == {200: 38, 429: 22}
        lost = [line for line in hives.queens[0].log if "ERROR rbee.queen.state" in line]
        assert len(lost) == 2, "each process says it once"


def test_a_redis_that_hangs_holds_nobody_up(hives: Hives) -> None:
    key = hives.key(requests_per_day=100_000)
    with hives.redis.stopped():
        began = time.monotonic()
        assert set(hives.all_at_once(80, lambda queen: ask(queen, key), threads=2)) == {200}
        # Had every request waited for it, this would be the least.
        assert time.monotonic() - began < 40 * TIMEOUT_S
    for queen in hives.queens:
        until_of(queen, lambda one: all(p["state_reached"] for p in status(one)["processes"]), "the return")
    assert hives.statuses(key, 8) == {200: 8}


def test_what_a_hive_tells_one_process_all_know_and_a_model_is_loaded_once(tmp_path: Path) -> None:
    with running_redis() as redis, running_queen("--processes", "3", "--state", redis.url, home=tmp_path) as queen:
        until(lambda: len(status(queen)["processes"]) == 3, "every process to answer")
        until(lambda: {knows_echo(queen) for _ in range(12)} == {True}, "every process to hear the hive")
        with ThreadPoolExecutor(24) as pool:
            assert set(pool.map(lambda _: ask(queen), range(48))) == {200}
        [hive] = status(queen)["hives"]
        assert [worker["model"] for worker in hive["workers"]] == ["echo"]


def knows_echo(queen: RunningQueen) -> bool:
    return "echo" in {model["id"] for model in call(queen, "GET", "/v1/models")[2]["data"]}


def test_what_is_at_a_queen_that_is_away_is_told_as_such(tmp_path: Path) -> None:
    with running_hives(tmp_path, processes=1) as hives:
        first, second = hives.queens
        job = post_job(second, chat())
        assert ended(first, job)["status"] == "completed"
        second.process.send_signal(signal.SIGTERM)
        second.process.wait(60)
        code, headers, answer = call(first, "GET", f"/v1/jobs/{job}")
        assert code == 503
        assert int(headers["retry-after"]) >= 1
        assert "nobody answers there" in answer["error"]["message"]
        assert call(first, "GET", "/v1/jobs")[0] == 200


def test_fewer_processes_take_over_what_the_others_left(tmp_path: Path) -> None:
    with running_redis() as redis, running_server("echo") as server:
        words = ("--no-hive", "--inventory", str(inventory(tmp_path / "inventory", w=server.url)), "--state", redis.url)
        with running_queen(*words, "--processes", "3", home=tmp_path) as queen:
            until(lambda: len(status(queen)["processes"]) == 3, "every process to answer")
            until(lambda: ask(queen) == 200, "the server to be known")
            server.behave(word_s=30)
            with ThreadPoolExecutor(12) as pool:
                jobs = list(pool.map(lambda _: post_job(queen, chat("for later")), range(24)))
            assert len({job.rpartition("_")[2] for job in jobs}) == 3
            for pid in [*server_processes(queen), queen.process.pid]:
                os.kill(pid, signal.SIGKILL)
            queen.process.wait()
        server.behave()
        with running_queen(*words, home=tmp_path) as queen:
            assert {ended(queen, job)["status"] for job in jobs} == {"completed"}
            assert not list((tmp_path / "state" / "records").glob("process-*"))
        with running_queen(*words, "--processes", "3", home=tmp_path) as queen:
            until(lambda: len(status(queen)["processes"]) == 3, "every process to answer")
            for job in jobs:
                assert call(queen, "GET", f"/v1/jobs/{job}")[2]["status"] in FINAL


def test_a_queen_of_several_processes_needs_a_state(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"2 server processes need a place for what they share\. Try: --state redis://"
    ):
        running_queen("--no-hive", "--processes", "2", home=tmp_path).__enter__()
    with pytest.raises(RuntimeError, match="--state-password-file FILE"):
        running_queen("--no-hive", "--state", "redis://:secret@127.0.0.1/0", home=tmp_path).__enter__()
