"""`llm-comply` compares whole answers and streams with the published schemas of three APIs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from rbee.testing.programs import RunningQueen

SKIPPED = {"chat-reasoning-summary", "reasoning-summary", "anth-thinking-display"}
"""What llm-comply itself asks of models with other names only."""
IMAGES = {"chat-image-input", "image-input", "anth-image-input"}
"""The built-in model cannot see: the queen has to say so."""


@pytest.mark.parametrize("api", ["openai-chat", "open-responses", "anthropic"])
def test_every_check_passes(queen: RunningQueen, judge: Callable[[str], str], api: str) -> None:
    results = run(judge("llm-comply"), queen, "--format", api)
    failed = {name: result["errors"] for name, result in results.items() if result["status"] == "failed"}
    (image,) = IMAGES & results.keys()
    assert failed.keys() == {image}, failed
    assert "HTTP 400 (expected [200])" in failed[image]
    assert {name for name, result in results.items() if result["status"] == "skipped"} <= SKIPPED
    assert len(results) >= 9


@pytest.mark.parametrize("api", ["openai-chat", "open-responses", "anthropic"])
def test_an_image_is_answered_with_400_that_names_vision(
    queen: RunningQueen, judge: Callable[[str], str], api: str
) -> None:
    text = output(judge("llm-comply"), queen, "--format", api, "--filter", ",".join(IMAGES), "--verbose")
    assert "vision" in text


def run(program: str, queen: RunningQueen, *arguments: str) -> dict[str, dict[str, Any]]:
    report = json.loads(output(program, queen, *arguments, "--json"))
    return {result["id"]: result for result in report["results"]}


def output(program: str, queen: RunningQueen, *arguments: str) -> str:
    command = [program, "--base-url", f"{queen.url}/v1", "--api-key", "local", "--model", "rbee-demo", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout
