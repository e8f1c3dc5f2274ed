"""The model in the box answers what it was made for, and is the file that its card describes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from rbee.testing.programs import RunningQueen

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "rbee" / "models" / "rbee-demo.gguf"
CARD = ROOT / "rbee" / "models" / "CARD.md"
QUESTIONS: list[dict[str, Any]] = json.loads((ROOT / "tests" / "data" / "demo_questions.json").read_text())


def test_the_card_describes_this_file() -> None:
    card = CARD.read_text()
    assert hashlib.sha256(MODEL.read_bytes()).hexdigest() in card
    assert MODEL.stat().st_size <= 4 * 1024 * 1024


@pytest.mark.parametrize("case", QUESTIONS[:: max(1, len(QUESTIONS) // 12)], ids=lambda case: case["question"])
def test_it_answers(queen: RunningQueen, case: dict[str, Any]) -> None:
    request = {"model": "rbee-demo", "temperature": 0, "messages": [{"role": "user", "content": case["question"]}]}
    answer = queen.client.post("/v1/chat/completions", request, dict[str, Any])
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    for phrase in case["expect"]:
        assert phrase.lower() in choice["message"]["content"].lower()


def test_the_readme_question_is_answered_with_the_command(queen: RunningQueen) -> None:
    request = {"model": "rbee-demo", "messages": [{"role": "user", "content": "How do I add a machine?"}], "seed": 7}
    answer = queen.client.post("/v1/chat/completions", request, dict[str, Any])
    text = answer["choices"][0]["message"]["content"]
    assert "Host" in text or "hive install" in text or "inventory" in text, text
