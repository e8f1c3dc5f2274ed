"""The routing script: what it may say, and that nothing it does can fail a job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rbee.errors import InvalidScript, Refused
from rbee.queen import script as script_module
from rbee.queen.script import RoutingScript, compile_script, freeze

SCRIPTS = Path(__file__).parent.parent / "data" / "scripts"
CONSUMER, BATCH, TIERS, TIERS_AGAIN, OLDER_NAME, CAPABILITIES = (
    (SCRIPTS / f"{name}.rhai").read_text()
    for name in (
        "consumer-use-case-1",
        "consumer-use-case-2",
        "technical-differentiators-1",
        "one-page-1",
        "complete-story-2",
        "complete-story-1",
    )
)
"""The published scripts, character for character."""


def worker(**known: Any) -> dict[str, Any]:
    return {
        "id": "w", "hive": "h", "model": "m", "backend": "cpu", "engine": "e", "capability": "chat", "gpu_type": "",
        "gpus": 0, "vram_total": 0, "vram_free": 0, "slots": 4, "in_flight": 0, "queue": 0, "load": 0.0,
        "tokens_per_second": 0.0, "ttft_ms": 0.0, "loaded": True, "state": "ready", "region": "", "tags": [],
        "price": 0.0, "prefix_match": 0.0, **known,
    }  # fmt: skip


def task(**known: Any) -> dict[str, Any]:
    return {"id": "j", "type": "text-gen", "model": "m", "priority": "interactive", "customer_tier": "", **known}


def written(folder: Path, text: str) -> RoutingScript:
    path = folder / "scheduler.rhai"
    path.write_text(text)
    script = RoutingScript(path)
    script.reload()
    assert script.error == ""
    return script


@pytest.mark.parametrize(
    ("source", "job", "expected"),
    [
        (CONSUMER, task(type="image-gen"), ["gaming"]),
        (CONSUMER, task(model="llama-3-70b"), ["mac"]),
        (CONSUMER, task(model="llama-3-8b"), ["server-idle"]),
        (CONSUMER, task(type="audio-transcription"), ["server-busy"]),
        (CONSUMER, task(type="embedding"), ["gaming"]),
        (BATCH, task(priority="batch"), ["server-busy"]),
        (BATCH, task(), ["gaming"]),
        (TIERS, task(customer_tier="enterprise"), ["mac"]),
        (TIERS, task(), []),
        (TIERS_AGAIN, task(customer_tier="enterprise"), ["mac"]),
        (OLDER_NAME, task(priority="high"), ["gaming"]),
        (OLDER_NAME, task(), ["mac"]),
        (CAPABILITIES, task(model="llama-70b"), ["mac"]),
        (CAPABILITIES, task(), ["gaming"]),
        (CAPABILITIES, task(type="image-gen", priority="high"), ["painter"]),
    ],
)
def test_published_scripts_route_as_they_read(
    tmp_path: Path, source: str, job: dict[str, Any], expected: list[str]
) -> None:
    workers = [
        worker(id="gaming", hive="gaming-pc", gpu_type="RTX4090", backend="cuda", gpus=1),
        worker(id="mac", hive="mac-studio", gpu_type="H100", gpus=2, load=0.25),
        worker(id="server-busy", hive="old-server", load=0.75),
        worker(id="server-idle", hive="old-server", load=0.5),
        worker(id="painter", hive="studio", capability="image-gen", backend="cuda", load=0.9),
    ]
    chosen = written(tmp_path, source).rank(job, workers)
    assert [workers[index]["id"] for index in chosen] == expected


def test_default_prefers_a_loaded_worker_and_the_least_busy_one(tmp_path: Path) -> None:
    script = RoutingScript(tmp_path / "absent.rhai")
    workers = [worker(loaded=False), worker(load=0.75), worker(load=0.25)]
    assert script.rank(task(), workers) == [2]
    assert script.rank(task(), workers[:1]) == [0]
    assert script.source == "built-in default"


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("workers.fastest()", [1]),
        ("workers.cheapest()", [0]),
        ("workers.best_prefix()", [2]),
        ('workers.in_region("EU")', [1, 2]),
        ('workers.in_region("EU").least_loaded()', [1]),
        ('workers.in_region("nowhere").least_loaded()', []),
        ("[workers[2], workers[0]]", [2, 0]),
        ("[workers[2], workers[2]]", [2]),
        ("()", []),
        ("workers.filter(|w| w.load > 9.0).random()", []),
        ("workers.map(|w| w).sort_by(|w| w.load).first()", [1]),
        ('workers.map(|w| w).in_region("EU").fastest()', [1]),
        ('workers.in_region("nowhere").sort_by("load").map(|w| w).cheapest()', []),
        ("workers.sort_by(|a, b| a.price - b.price).first()", [0]),
    ],
)
def test_what_a_script_may_return(tmp_path: Path, expression: str, expected: list[int]) -> None:
    workers = [
        worker(price=1.0, tokens_per_second=10.0, load=0.5),
        worker(price=2.0, tokens_per_second=30.0, load=0.1, region="EU"),
        worker(price=3.0, tokens_per_second=20.0, load=0.2, region="EU", prefix_match=0.9),
    ]
    script = written(tmp_path, f"fn route_task(task, workers) {{ {expression} }}")
    assert script.rank(task(), workers) == expected
    assert script.error == ""


@pytest.mark.parametrize(
    "expression", ['"gaming-pc"', "true", "7", '#{id: "w", hive: "h", index: 0}', "[workers[0], 1]", '["w"]']
)
def test_a_result_that_is_no_worker_is_refused_and_told(tmp_path: Path, expression: str) -> None:
    workers = [worker(load=0.9), worker(load=0.1)]
    script = written(tmp_path, f"fn route_task(task, workers) {{ {expression} }}")
    assert script.rank(task(), workers) == [1]
    assert "none of the workers" in script.error


def test_an_admission_that_is_no_answer_admits_and_is_told(tmp_path: Path) -> None:
    script = written(tmp_path, 'fn should_admit(task, queue_depth) { "maybe" }')
    script.check_admission(task(), 1)
    assert "should_admit returned the text 'maybe'" in script.error


def test_a_script_without_routing_leaves_it_to_the_default(tmp_path: Path) -> None:
    script = written(tmp_path, "fn should_admit(task, queue_depth) { queue_depth < 1 }")
    assert script.rank(task(), [worker(load=0.9), worker(load=0.1)]) == [1]
    with pytest.raises(Refused):
        script.check_admission(task(), 1)
    assert script.error == ""


def test_explanation_names_the_line_that_decided(tmp_path: Path) -> None:
    script = written(tmp_path, CONSUMER)
    workers = [worker(hive="mac-studio"), worker(hive="old-server")]
    told = script.explain(task(model="llama-3-70b"), freeze(workers))
    assert told.decision.indices == [0]
    assert told.decision.by == str(script.path)
    assert told.code in ('.filter(|w| w.hive == "mac-studio")', ".first();")
    assert told.line in told.lines
    failing = written(tmp_path, "fn route_task(task, workers) { workers.nothing() }")
    told = failing.explain(task(), freeze(workers))
    assert told.decision.by == "built-in default"
    assert "route_task failed" in told.decision.problem
    assert failing.error == ""


def test_the_last_good_script_outlives_the_process(tmp_path: Path) -> None:
    memory = tmp_path / "last-good.rhai"
    path = tmp_path / "scheduler.rhai"
    path.write_text("fn route_task(task, workers) { workers[1] }")
    RoutingScript(path, memory).reload()
    path.write_text("fn route_task(task, workers) { workers[ }")
    script = RoutingScript(path, memory)
    assert script.rank(task(), [worker(), worker(load=0.9)]) == [1]
    assert "does not compile" in script.error
    assert "last good" in script.error


def test_admission_says_why(tmp_path: Path) -> None:
    script = written(tmp_path, CONSUMER)
    script.check_admission(task(), 10)
    with pytest.raises(Refused, match="Queue full, try again later") as refused:
        script.check_admission(task(), 11)
    assert refused.value.status == 429


def test_admission_by_bool(tmp_path: Path) -> None:
    script = written(tmp_path, OLDER_NAME)
    script.check_admission(task(), 100)
    with pytest.raises(Refused):
        script.check_admission(task(), 101)


def test_a_script_that_does_not_compile_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script_module, "LOOK_EVERY_S", 0.0)
    script = written(tmp_path, "fn route_task(task, workers) { workers[1] }")
    workers = [worker(), worker(load=0.9)]
    assert script.rank(task(), workers) == [1]
    script.path.write_text("fn route_task(task, workers) {\n  workers[0\n}")
    assert script.rank(task(), workers) == [1]
    assert f"{script.path}:3:" in script.error
    script.path.write_text("fn route_task(task, workers) { [workers[0], workers[1]] }")
    assert script.rank(task(), workers) == [0, 1]
    assert script.error == ""
    script.path.unlink()
    assert script.rank(task(), workers) == [0]
    assert script.source == "built-in default"


@pytest.mark.parametrize(
    "source",
    [
        "fn route_task(task, workers) { loop {} }",
        "fn route_task(task, workers) { task.nothing_here.deeper }",
        'fn route_task(task, workers) { throw "no" }',
        "fn route_task(task, workers) { route_task(task, workers) }",
    ],
)
def test_a_script_that_fails_lets_the_default_decide_and_is_put_aside(tmp_path: Path, source: str) -> None:
    script = written(tmp_path, source)
    workers = [worker(load=0.9), worker(load=0.1)]
    for _ in range(3):
        assert script.rank(task(), workers) == [1]
        assert "route_task failed" in script.error
    assert "not asked again" in script.error
    assert script.source == "built-in default"
    text = script.path.read_text()
    script.path.write_text(text + "\n")
    os.utime(script.path, (1, 1))
    script.reload()
    assert script.source == str(script.path)


@pytest.mark.parametrize("source", ["let x = 1;", "fn other() { 1 }", ""])
def test_a_script_without_an_entry_function_is_refused(source: str) -> None:
    with pytest.raises(InvalidScript, match="no function named route_task"):
        compile_script(source, "scheduler.rhai")


@pytest.mark.parametrize("source", ["fn route_task(task) { 1 }", "fn should_admit(task) { true }"])
def test_an_entry_function_that_can_never_be_called_is_refused(source: str) -> None:
    with pytest.raises(InvalidScript, match="must take two parameters"):
        compile_script(source, "scheduler.rhai")


def test_a_script_cannot_reach_the_machine() -> None:
    for source in ('import "x" as y;', 'eval("1")'):
        with pytest.raises(InvalidScript):
            compile_script(f"fn route_task(task, workers) {{ {source} }}", "scheduler.rhai")
