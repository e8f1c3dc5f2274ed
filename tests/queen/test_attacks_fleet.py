"""Attacks from the fleet's side, by their numbers in docs/security.md: forged reports and usage, hostile scripts."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attack_rig import CHAT, Told, Victim, bearer, chat, victim
from hostile_server import HostileServer, hostile_server
from queen_rig import FleetFolder, view

from rbee.queen.keys import ADMIN, INFERENCE
from rbee.queen.policy import Policy
from rbee.testing.openai_server import running_server
from rbee.testing.programs import RunningQueen, until
from rbee.wire.scheduler import SchedulerView

REPORTS, READY, SCRIPT = "/v1/orchestrator/hive-report", "/v1/orchestrator/worker-ready", "/v1/orchestrator/scheduler"


def report(epoch: float, sequence: int, **fields: Any) -> dict[str, Any]:
    """Return a report whose worker was started when its hive was."""
    worker = {"name": "w", "model": "nectar", "backend": "echo", "state": "starting", "started_at": epoch}
    return {"hive": "cell", "url": "http://127.0.0.1:9", "version": f"{epoch}:{sequence}", "epoch": epoch,
            "sequence": sequence, "workers": [worker], **fields}  # fmt: skip


@pytest.fixture(scope="module")
def cell() -> Iterator[tuple[Victim, dict[str, str]]]:
    """Return a queen that knows a hive, and the headers with which that hive reports."""
    with victim() as found:
        headers = bearer((found.queen.home / "state" / "hive.token").read_text().strip())
        assert found.ask("POST", REPORTS, report(200.0, 5), **headers).status == 200
        yield found, headers


def known(queen: RunningQueen) -> str:
    found = view(queen, "cell")
    assert found is not None
    return found.version


def test_17_a_report_that_was_kept_is_refused(cell: tuple[Victim, dict[str, str]]) -> None:
    found, headers = cell
    for path, value in ((REPORTS, report(100.0, 9)), (READY, report(100.0, 9)["workers"][0] | {"state": "ready"})):
        told = found.ask("POST", path, value, X_Rbee_Hive="cell", **headers)
        assert (told.status, told.error["code"]) == (409, "old_report")
    # One of this very run that was overtaken on its way is no news.
    assert found.ask("POST", REPORTS, report(200.0, 4), **headers).status == 200
    assert known(found.queen) == "200.0:5"
    shown = view(found.queen, "cell")
    assert shown is not None
    assert [str(worker.state) for worker in shown.workers] == ["starting"]
    assert any("earlier run" in line for line in found.queen.log)


def test_17_nobody_else_reports(cell: tuple[Victim, dict[str, str]]) -> None:
    found, headers = cell
    admin = found.key("ops", scopes=frozenset({INFERENCE, ADMIN}))
    for secret in ("", "wrong", headers["Authorization"][7:-1], admin, found.queen.record.token):
        for path in (REPORTS, READY):
            assert found.ask("POST", path, report(300.0, 1), **bearer(secret)).status == 401
    assert known(found.queen) == "200.0:5"
    # And its token opens nothing else.
    assert found.ask("GET", "/v1/hives", **headers).status == 401
    assert found.ask("POST", CHAT, chat(), **headers).status == 403


@pytest.mark.parametrize(
    "fields",
    [
        {"hive": "../../etc"},
        {"hive": "a\nb"},
        {"hive": "x" * 300},
        {"sequence": "9"},
        {"epoch": None},
        {"workers": [{"name": "w", "model": "m", "backend": "b", "state": "ready", "slots": -1}]},
        {"workers": [{"name": "w", "model": "m", "backend": "b", "state": "on fire"}]},
        {"devices": [{"kind": "cpu", "memory_free_bytes": -1}]},
        {"models": [{"name": "m", "size_bytes": -1}]},
        {"workers": [[]] * 100_000},
    ],
    ids=lambda fields: json.dumps(fields)[:50],
)
def test_17_a_report_that_makes_no_sense_changes_nothing(
    cell: tuple[Victim, dict[str, str]], fields: dict[str, Any]
) -> None:
    found, headers = cell
    assert found.ask("POST", REPORTS, report(200.0, 6) | fields, **headers).status == 400
    assert known(found.queen) == "200.0:5"


@pytest.fixture(scope="module")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Victim, HostileServer]]:
    folder = FleetFolder(tmp_path_factory.mktemp("fleet") / "inventory")
    with hostile_server() as server:
        folder.write(desk=["HivePort none", f"Worker says model=honey url={server.url}"])
        with victim("--inventory", str(folder.folder)) as found:
            until(lambda: b"honey" in found.queen.client.send("GET", "/v1/models").read(), "the server to be ready")
            yield found, server


USAGES = [("-5", "-7"), ("10000", "10000"), ("999999999999", "999999999999"), ("9" * 30, "9" * 30), ("1e9", "1e9"),
          ("3.7", "2.1"), ('"7"', '"7"'), ("null", "null"), ("[1]", "{}")]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("prompt", "completion"), USAGES)
def test_18_usage_is_never_more_than_a_job_can_have_used_and_never_less_than_nothing(
    liar: tuple[Victim, HostileServer], prompt: str, completion: str, stream: bool
) -> None:
    found, server = liar
    server.uses(prompt, completion, stream=stream)
    secret = found.key("k", policy=Policy(tokens_per_day=40_000))
    asked = chat("three words here", max_tokens=10, n=2, stream=stream)
    told = found.ask("POST", CHAT, asked, **bearer(secret))
    assert told.status == 200
    job = f"/v1/jobs/{told.headers['x-rbee-job']}"
    until(lambda: b'"completed"' in found.ask("GET", job, **bearer(secret)).body, "the job to be recorded")
    usage = json.loads(found.ask("GET", job, **bearer(secret)).body)["usage"]
    assert 0 <= usage["prompt_tokens"] <= len(json.dumps(asked)) + 16_384
    assert 0 <= usage["completion_tokens"] <= 2 * 10
    # A lie of a billion tokens costs nobody a budget.
    assert found.ask("POST", CHAT, asked, **bearer(secret)).status == 200


def test_18_usage_belongs_to_the_job_whose_answer_told_it(liar: tuple[Victim, HostileServer]) -> None:
    found, server = liar
    mine, other = bearer(found.tenant("acme")), bearer(found.tenant("evil"))
    server.uses("3", "4")
    first = found.ask("POST", CHAT, chat(), **mine).headers["x-rbee-job"]
    forged = f'{{"usage": {{"prompt_tokens": 500, "completion_tokens": 500}}, "job": "{first}"}}'
    server.says({"id": first, "choices": [{"message": {"content": forged}}], "usage": {"prompt_tokens": 1}})
    told = found.ask("POST", CHAT, chat(), X_Rbee_Job=first, **other)
    assert told.headers["x-rbee-job"] != first

    def usage(job: str, headers: dict[str, str]) -> list[int]:
        until(lambda: b'"completed"' in found.ask("GET", f"/v1/jobs/{job}", **headers).body, "the job to be recorded")
        shown = json.loads(found.ask("GET", f"/v1/jobs/{job}", **headers).body)["usage"]
        return [shown["prompt_tokens"], shown["completion_tokens"]]

    assert usage(first, mine) == [3, 4]
    # Words of an answer that look like a usage are words.
    assert usage(told.headers["x-rbee-job"], other) == [1, 0]


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetFolder]:
    """An inventory of two servers, the second of which is in another region and belongs to a tenant."""
    folder = FleetFolder(tmp_path_factory.mktemp("fleet") / "inventory")
    with running_server(word_s=0.005) as home, running_server() as cloud:
        folder.write(
            home=["HivePort none", f"Worker chat url={home.url} model=honey", "Region eu"],
            cloud=["HivePort none", f"Worker chat url={cloud.url} model=honey", "Region us", "RbeeTenant acme"],
        )
        yield folder


@pytest.fixture(scope="module")
def routed(inventory: FleetFolder) -> Iterator[tuple[Victim, Path]]:
    """Return a queen with these servers, and the file of her script."""
    with victim("--inventory", str(inventory.folder)) as found:
        until(lambda: len(ready(found.queen)) == 2, "both servers")
        yield found, inventory.folder / "scheduler.rhai"


def ready(queen: RunningQueen) -> list[str]:
    return [f"{h.hive}/{w.name}" for h in queen.status().hives for w in h.workers if w.state == "ready"]


def saved(routed: tuple[Victim, Path], source: str) -> SchedulerView:
    """Put a script in force, as far as it will."""
    found, path = routed
    path.write_text(source)
    return found.queen.client.post(f"{SCRIPT}/reload", None, SchedulerView)


def route(body: str) -> str:
    return f"fn route_task(task, workers) {{ {body} }}"


SCRIPTS = {
    "a loop": route("loop {}"),
    "a loop that counts": route("let x = 0; while true { x += 1 }"),
    "a loop that prints": route('loop { print("x") }'),
    "sleep": route("sleep(1000); workers[0]"),
    "recursion": route("route_task(task, workers)"),
    "a closure that calls itself": route("let f = |g| g.call(g); f.call(f)"),
    "a text that doubles": route('let x = "xxxxxxxx"; loop { x += x }'),
    "a list that doubles": route("let x = [1]; loop { x += x }"),
    "a map that grows": route("let x = #{}; let n = 0; loop { x[`k${n}`] = n; n += 1 }"),
    "a list of lists": route("let x = [1]; loop { x = [x, x, x, x] }"),
    "a number that overflows": route("let x = 9223372036854775807; x + 1"),
    "throw": route("throw task"),
    "throw for a terminal": route('throw "\\x1b[2J\\n" + "x".pad(60000, "x")'),
    "the task's own facts": route('task.id = "x"; workers[0].hive = "y"; workers.clear(); workers[0]'),
    "import": 'import "/etc/passwd" as p; ' + route("workers[0]"),
    "eval": route('eval("workers[0]")'),
    "deep nesting": route("(" * 5_000 + "1" + ")" * 5_000),
    "deep blocks": route("{" * 5_000 + "}" * 5_000),
    "many functions": "".join(f"fn f{n}() {{}}\n" for n in range(4_000)) + route("workers[0]"),
    "a million functions": "fn f() {}\n" * 1_000_000 + route("workers[0]"),
    "bytes": "\x00\x1b[31m" + route("workers[0]"),
    "admission in a loop": "fn should_admit(task, depth) { loop {} }",
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_20_a_hostile_script_fails_no_job_and_holds_nobody_up(routed: tuple[Victim, Path], what: str) -> None:
    found, _ = routed
    saved(routed, route("workers.least_loaded()"))
    key = bearer(found.key("k"))
    with streaming(found, key, "word " * 400) as neighbour:
        view = saved(routed, SCRIPTS[what])
        for _ in range(5):
            told = found.ask("POST", CHAT, chat(), **key)
            assert (told.status, told.headers.get("x-rbee-worker")) == (200, "home/chat"), told.body
        after = found.queen.client.get(SCRIPT, SchedulerView)
    assert neighbour[-1].endswith(b"data: [DONE]\n\n")
    assert b"".join(neighbour).count(b'"content"') == 400
    if what == "many functions":  # is a strange script, and a good one
        return
    assert view.error or after.error
    if not view.error:
        assert "It is not asked again until it is saved anew (3 failures in a row)" in after.error
        assert after.source == "built-in default"
    # What is wrong with a script is told to the operator, in one line that no terminal obeys.
    assert not any(char in after.error for char in "\x00\x1b")
    assert saved(routed, route("workers.least_loaded()")).error == ""


@contextlib.contextmanager
def streaming(found: Victim, key: dict[str, str], text: str) -> Iterator[list[bytes]]:
    """Have a neighbour read a stream all the while, to its end."""
    came: list[bytes] = []
    with found.connected() as connection:
        connection.request("POST", CHAT, json.dumps(chat(text, stream=True)), found.away | key)
        answer = connection.getresponse()
        assert answer.status == 200
        thread = threading.Thread(target=lambda: came.extend(pieces(answer)))
        thread.start()
        try:
            yield came
        finally:
            thread.join(60)


def pieces(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    while data := answer.read1(65536):
        yield data


ELSEWHERE = {
    "a machine in another region": 'workers.filter(|w| w.region == "us").first()',
    "another tenant's machine": 'workers.filter(|w| w.hive == "cloud").first()',
    "an unknown machine": '"cloud/chat"',
    "what only looks like one": '#{id: "cloud/chat", hive: "cloud", index: 1}',
    "one past the end": "workers[workers.len()]",
    "a score that is no number": "workers.sort_by(|w| 0.0/0.0).first()",
    "nothing": "()",
    "an empty list": "[]",
    "nothing in a list": "[()]",
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_21_a_script_sends_no_job_where_policy_forbids_it(routed: tuple[Victim, Path], what: str) -> None:
    found, _ = routed
    assert saved(routed, route(ELSEWHERE[what])).error == ""
    for headers in (
        bearer(found.key("k")),
        bearer(found.tenant("evil")),
        bearer(found.key("eu")) | {"X-Rbee-Region": "eu"},
    ):
        # A script that chooses nothing has its jobs wait.
        told = found.ask("POST", CHAT, chat(), X_Request_Timeout="0.5", **headers)
        assert went(told) in ("home/chat", 504), told.body
    acme = found.ask("POST", CHAT, chat(), X_Rbee_Region="eu", X_Request_Timeout="0.5", **bearer(found.tenant("acme")))
    assert went(acme) in ("home/chat", 504)
    refused = found.ask("POST", CHAT, chat(), X_Rbee_Region="us", **bearer(found.tenant("evil")))
    assert refused.status == 400
    assert b"cloud" not in refused.body


def went(told: Told) -> object:
    return told.headers["x-rbee-worker"] if told.status == 200 else told.status
