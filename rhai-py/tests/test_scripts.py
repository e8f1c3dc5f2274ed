"""Scripts as their authors write them run as printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rhai

SCRIPTS = Path(__file__).parent / "scripts"
WORKERS = [
    {"id": 0, "hive": "gaming-pc", "gpu_type": "RTX4080", "load": 0.1},
    {"id": 1, "hive": "gaming-pc", "gpu_type": "RTX4090", "load": 0.9},
    {"id": 2, "hive": "mac-studio", "gpu_type": "M2", "load": 0.2},
    {"id": 3, "hive": "old-server", "gpu_type": "RTX3090", "load": 0.6},
    {"id": 4, "hive": "old-server", "gpu_type": "A100", "load": 0.3},
    {"id": 5, "hive": "rack", "gpu_type": "H100", "load": 0.4},
    {"id": 6, "hive": "rack", "gpu_type": "H100", "load": 0.05},
]
EXTRA = [
    {"capability": "text-gen", "backend": "cuda", "gpus": 1, "queue": 0, "models": ["m"]},
    {"capability": "image-gen", "backend": "cuda", "gpus": 2, "queue": 1, "models": []},
    {"capability": "text-gen", "backend": "metal", "gpus": 1, "queue": 1, "models": ["m"]},
    {"capability": "image-gen", "backend": "cuda", "gpus": 1, "queue": 0, "models": ["x"]},
    {"capability": "text-gen", "backend": "cpu", "gpus": 4, "queue": 9, "models": ["m"]},
    {"capability": "text-gen", "backend": "cpu", "gpus": 1, "queue": 0, "models": ["m", "x"]},
    {"capability": "text-gen", "backend": "cuda", "gpus": 1, "queue": 8, "models": ["x"]},
]
FROZEN = rhai.freeze([base | extra for base, extra in zip(WORKERS, EXTRA, strict=True)])
TASKS = {
    "image": {"type": "image-gen", "model": "sdxl", "priority": "high", "customer_tier": "enterprise"},
    "large": {"type": "text-gen", "model": "llama-3-70b", "priority": "batch", "customer_tier": "free"},
    "small": {"type": "text-gen", "model": "llama-3-8b", "priority": "normal", "customer_tier": "free"},
    "audio": {"type": "audio-transcription", "model": "m", "priority": "normal", "customer_tier": "free"},
    "other": {"type": "embedding", "model": "x", "priority": "batch", "customer_tier": "enterprise"},
}


def load(engine: rhai.Engine, name: str) -> rhai.Script:
    return engine.compile((SCRIPTS / f"{name}.rhai").read_text(encoding="utf-8"), name=f"{name}.rhai")


@pytest.mark.parametrize(
    ("script", "chosen"),
    [
        ("home", {"image": 1, "large": 2, "small": 4, "audio": 3, "other": 6}),
        ("tiers", {"image": 6, "large": 4, "small": 4, "audio": 4, "other": 6}),
        ("batch", {"image": 0, "large": 3, "small": 0, "audio": 0, "other": 3}),
        ("capability", {"image": 3, "large": 1, "small": 6, "audio": 6, "other": 6}),
        ("scoring", {"image": 6, "large": 6, "small": 6, "audio": 0, "other": 6}),
    ],
)
def test_route_chooses(engine: rhai.Engine, script: str, chosen: dict[str, int]) -> None:
    compiled = load(engine, script)

    assert {name: compiled.call("route_task", task, FROZEN).index for name, task in TASKS.items()} == chosen


@pytest.mark.parametrize("script", ["home", "tiers", "batch", "capability", "scoring"])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_route_over_no_workers_chooses_nothing(engine: rhai.Engine, script: str, task: dict[str, Any]) -> None:
    assert load(engine, script).call("route_task", task, rhai.freeze([])) is None


def test_admission(engine: rhai.Engine) -> None:
    home, schedule = load(engine, "home"), load(engine, "schedule")

    assert home.call("should_admit", TASKS["image"], 10) == {"admit": True}
    assert home.call("should_admit", {}, 11) == {"admit": False, "reason": "Queue full, try again later"}
    assert schedule.call("should_admit", {}, 100) is True
    assert schedule.call("should_admit", {}, 101) is False
    assert schedule.call("schedule_job", {"priority": "high"}, FROZEN).index == 6
    assert schedule.call("schedule_job", {"priority": "low"}, FROZEN).index == 4


def test_summary(engine: rhai.Engine) -> None:
    assert load(engine, "scoring").call("summary", FROZEN) == "7 workers on 4 hives"
