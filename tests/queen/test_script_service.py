"""The routing script of a running queen: saved, replaced, explained, and asked for every job."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_calls import CHAT, call
from queen_rig import FleetFolder

from rbee.errors import RbeeError
from rbee.queen.keys import KeyStore
from rbee.queen.policy import Policy
from rbee.testing.openai_server import running_server
from rbee.testing.programs import RunningQueen, running_queen, until
from rbee.wire.scheduler import ExplainJob, Explanation, ReplaceScript, SchedulerView

API = "/v1/orchestrator/scheduler"
HONEY = {"model": "honey", "messages": [{"role": "user", "content": "one two three"}]}
TO_CLOUD = 'fn route_task(task, workers) {\n    return workers.filter(|w| w.hive == "cloud").first();\n}\n'
TO_HOME = TO_CLOUD.replace("cloud", "home")


@pytest.fixture
def declared(fleet: FleetFolder) -> Iterator[FleetFolder]:
    """An inventory with a server in each of two regions, the second of which belongs to a tenant."""
    with running_server() as home, running_server() as cloud:
        fleet.write(
            home=["HivePort none", f"Worker chat url={home.url} model=honey", "Region eu"],
            cloud=["HivePort none", f"Worker chat url={cloud.url} model=honey", "Region us", "RbeePrice 0.5"],
        )
        yield fleet


@contextlib.contextmanager
def serving(fleet: FleetFolder, *more: str, **options: Any) -> Iterator[RunningQueen]:
    with running_queen("--no-hive", "--inventory", str(fleet.folder), *more, **options) as queen:
        until(lambda: len(ready(queen)) == 2, "both servers to be ready")
        yield queen


def ready(queen: RunningQueen) -> list[str]:
    return [f"{h.hive}/{w.name}" for h in queen.status().hives for w in h.workers if w.state == "ready"]


def served_by(queen: RunningQueen, **headers: str) -> str:
    status, told, body = call(queen, "POST", CHAT, HONEY, **headers)
    assert status == 200, body
    return told["x-rbee-worker"]


def explained(queen: RunningQueen, **job: Any) -> Explanation:
    return queen.client.post(f"{API}/explain", ExplainJob(model="honey", **job), Explanation)


def test_a_saved_script_decides_and_a_broken_one_does_not(declared: FleetFolder) -> None:
    script = declared.folder / "scheduler.rhai"
    script.write_text(TO_CLOUD)
    with serving(declared) as queen:
        assert served_by(queen) == "cloud/chat"
        script.write_text(TO_HOME)
        until(lambda: served_by(queen) == "home/chat", "the saved script to decide")
        script.write_text("fn route_task(task, workers) {\n    workers[\n}")
        view = queen.client.post(f"{API}/reload", None, SchedulerView)
        assert f"{script}:3:" in view.error
        assert view.text == TO_HOME
        assert served_by(queen) == "home/chat"
        script.write_text('fn other() { "no entry function" }')
        assert "no function named route_task" in queen.client.post(f"{API}/reload", None, SchedulerView).error
        assert served_by(queen) == "home/chat"
        script.unlink()
        assert queen.client.post(f"{API}/reload", None, SchedulerView).source == "built-in default"


def test_region_and_tenant_hold_whatever_the_script_says(declared: FleetFolder) -> None:
    (declared.folder / "scheduler.rhai").write_text('fn route_task(t, w) { w.sort_by("hive") }')
    declared.file.write_text(declared.file.read_text() + "    RbeeTenant acme\n")
    home = Path(tempfile.mkdtemp(prefix="rbee-script-"))
    try:
        _, secret = KeyStore(home / "state" / "keys.sqlite").create("a", policy=Policy(tenant="acme"))
        acme = {"Authorization": f"Bearer {secret}"}
        with serving(declared, home=home) as queen:
            assert served_by(queen) == "home/chat"
            assert served_by(queen, **acme) == "cloud/chat"
            assert served_by(queen, **acme, X_Rbee_Region="EU") == "home/chat"
            status, _, body = call(queen, "POST", CHAT, HONEY, X_Rbee_Region="us")
            assert (status, "another tenant" in body["error"]["message"]) == (400, True)
            assert call(queen, "POST", CHAT, HONEY, X_Rbee_Region="no such/region")[0] == 400
            told = explained(queen)
            assert told.refused == {"cloud/chat": "it is another tenant's"}
            assert explained(queen, tenant="acme", region="us").chosen == ["cloud/chat"]
    finally:
        shutil.rmtree(home)


def test_explain_names_worker_line_and_reason(declared: FleetFolder) -> None:
    (declared.folder / "scheduler.rhai").write_text(TO_CLOUD)
    with serving(declared) as queen:
        told = explained(queen, priority="batch", customer_tier="gold")
        assert told.chosen == ["cloud/chat"]
        assert (told.function, told.line) == ("route_task", 2)
        assert told.code == 'return workers.filter(|w| w.hive == "cloud").first();'
        assert (told.task["priority"], told.task["customer_tier"]) == ("batch", "gold")
        assert {worker["id"]: worker["price"] for worker in told.workers} == {"home/chat": 0.0, "cloud/chat": 0.5}
        assert explained(queen, capability="text-gen").chosen == ["cloud/chat"]
        with pytest.raises(RbeeError, match="is no capability"):
            explained(queen, capability="poetry")


def test_the_speed_of_streams_is_what_fastest_goes_by(declared: FleetFolder) -> None:
    (declared.folder / "scheduler.rhai").write_text("fn route_task(t, w) { w.filter(|w| w.hive == t.tags[0]).first() }")
    streamed = {**HONEY, "stream": True, "stream_options": {"include_usage": True}}
    streamed["messages"] = [{"role": "user", "content": "word " * 12}]
    with serving(declared) as queen:
        request = urllib.request.Request(queen.url + CHAT, json.dumps(streamed).encode(), {"X-Rbee-Tags": "cloud"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.read().endswith(b"data: [DONE]\n\n")
        speeds = {worker["id"]: worker["tokens_per_second"] for worker in explained(queen, tags=["home"]).workers}
        assert speeds["cloud/chat"] > 0.0
        assert speeds["home/chat"] == 0.0
        (declared.folder / "scheduler.rhai").write_text("fn route_task(task, workers) { workers.fastest() }")
        assert queen.client.post(f"{API}/reload", None, SchedulerView).error == ""
        assert served_by(queen) == "cloud/chat"


def test_the_scripts_refusal_reaches_the_client(declared: FleetFolder) -> None:
    (declared.folder / "scheduler.rhai").write_text(
        'fn should_admit(task, depth) { if task.tags.contains("late") { return reject("Come tomorrow"); } admit() }'
    )
    with serving(declared) as queen:
        assert call(queen, "POST", CHAT, HONEY)[0] == 200
        status, headers, body = call(queen, "POST", CHAT, HONEY, X_Rbee_Tags="early, late")
        assert (status, "Come tomorrow" in body["error"]["message"]) == (429, True)
        assert int(headers["retry-after"]) > 0


def test_only_the_operator_may_see_or_replace_the_script(declared: FleetFolder) -> None:
    with serving(declared) as queen:
        for method, path in [("GET", API), ("PUT", API), ("POST", f"{API}/reload"), ("POST", f"{API}/explain"),
                             ("GET", f"{API}/decisions")]:  # fmt: skip
            assert call(queen, method, path, {"text": TO_CLOUD})[0] == 401, path
        with pytest.raises(RbeeError, match="does not compile"):
            queen.client.send("PUT", API, ReplaceScript(text="fn route_task("))
        queen.client.send("PUT", API, ReplaceScript(text=TO_CLOUD)).close()
        assert served_by(queen) == "cloud/chat"
        assert (declared.folder / "scheduler.rhai").read_text() == TO_CLOUD


def test_a_platforms_script_is_the_operators_alone(declared: FleetFolder) -> None:
    script = declared.folder / "scheduler.rhai"
    script.write_text(TO_CLOUD)
    with serving(declared, "--platform") as queen:
        assert queen.client.get(API, SchedulerView).source == "built-in default"
        assert served_by(queen) == "home/chat"
        queen.client.send("PUT", API, ReplaceScript(text=TO_CLOUD)).close()
        assert served_by(queen) == "cloud/chat"
        script.write_text(TO_HOME)
        view = queen.client.post(f"{API}/reload", None, SchedulerView)
        assert (view.platform, view.text) == (True, TO_CLOUD)
        assert served_by(queen) == "cloud/chat"
        assert script.read_text() == TO_HOME


def test_decisions_can_be_read_and_hold_no_prompt(declared: FleetFolder) -> None:
    with serving(declared) as queen:
        assert call(queen, "POST", CHAT, HONEY, X_Rbee_Tags="red")[0] == 200
        lines = queen.client.send("GET", f"{API}/decisions?since_s=60").read().decode()
        assert "one two three" not in lines
        places, decision = map(json.loads, lines.splitlines())
        assert {worker["id"] for worker in places["workers"]} == {"home/chat", "cloud/chat"}
        assert (decision["chosen"], decision["task"]["tags"]) == (["home/chat"], ["red"])
