"""The routing script: what it may say, and that nothing it does can fail a job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rbee.errors import InvalidScript, Refused
from rbee.queen import script as script_module
from rbee.queen.script import RoutingScript, compile_script

CONSUMER = """
fn route_task(task, workers) {
    if task.type == "image-gen" {
        return workers.filter(|w| w.hive == "gaming-pc").filter(|w| w.gpu_type == "RTX4090").first();
    }
    if task.type == "text-gen" && task.model.contains("70b") {
        return workers.filter(|w| w.hive == "mac-studio").first();
    }
    if task.type == "text-gen" && task.model.contains("8b") {
        return workers.filter(|w| w.hive == "old-server").least_loaded();
    }
    if task.type == "audio-transcription" {
        return workers.filter(|w| w.hive == "old-server").first();
    }
    return workers.least_loaded();
}
fn should_admit(task, queue_depth) {
    if queue_depth > 10 {
        return reject("Queue full, try again later");
    }
    return admit();
}
"""
BATCH = """
fn route_task(task, workers) {
    if task.priority == "batch" {
        return workers.filter(|w| w.hive == "old-server").first();
    }
    return workers.filter(|w| w.hive == "gaming-pc").first();
}
"""
TIERS = """
fn route_task(task, workers) {
    if task.customer_tier == "enterprise" {
        return workers.filter(|w| w.gpu_type == "H100").least_loaded();
    }
    return workers.filter(|w| w.gpu_type == "A100").least_loaded();
}
"""
OLDER_NAME = """
fn schedule_job(job, workers) {
    if job.priority == "high" {
        return workers.filter(|w| w.backend == "cuda").least_loaded();
    } else {
        return workers.filter(|w| w.backend == "cpu").first();
    }
}
fn should_admit(job, queue_depth) {
    if queue_depth > 100 {
        return false;
    }
    return true;
}
"""
CAPABILITIES = """
fn route_task(task, workers) {
    if task.type == "image-gen" && task.priority == "high" {
        return workers.filter(|w| w.capability == "image-gen" && w.backend == "cuda").least_loaded();
    } else if task.type == "text-gen" && task.model.contains("70b") {
        return workers.filter(|w| w.gpus > 1).first();
    } else {
        return workers.least_loaded();
    }
}
"""


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
        (OLDER_NAME, task(priority="high"), ["gaming"]),
        (OLDER_NAME, task(), ["mac"]),
        (CAPABILITIES, task(model="llama-70b"), ["mac"]),
        (CAPABILITIES, task(), ["gaming"]),
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
        ('"gaming-pc"', []),
        ("workers.random().id.len() > 0", []),
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


def test_a_script_cannot_reach_the_machine() -> None:
    for source in ('import "x" as y;', 'eval("1")'):
        with pytest.raises(InvalidScript):
            compile_script(f"fn route_task(task, workers) {{ {source} }}", "scheduler.rhai")
