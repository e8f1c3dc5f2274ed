"""Plugins are other people's code: one that is broken is a line in a list, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rbee.testing import started_worker
from rbee.testing.plugins import BACKEND, install
from rbee.wire.fleet import WorkerSpec

LOAD = "def load(self, spec, progress): return Loaded(slots=1)"
CHECK = LOAD + "\n    @classmethod\n    def check(cls): "
BROKEN = {
    "raises": (
        "raise RuntimeError('no luck\\ntoday')",
        "rbee_raises:Plugin failed: RuntimeError: no luck today",
    ),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "needs": ("import a_library_that_is_not_there", "No module named 'a_library_that_is_not_there'"),
    "wrong-syntax": ("class Plugin(", "SyntaxError"),
    "has-none": ("x = 1", "has no attribute 'Plugin'"),
    "is-function": ("def Plugin(): pass", "no subclass of"),
    "is-plain": ("class Plugin: pass", "no subclass of"),
    "lacks-load": (BACKEND.format(name="lacks-load", body="pass"), "lacks load"),
    "lacks-name": (BACKEND.replace("name, summary", "nothing, summary").format(name="x", body=LOAD), "lacks name"),
    "is-older": (BACKEND.format(name="is-older", body="api_version = 0\n    " + LOAD), "plugin API 0"),
    "says-no": (
        BACKEND.format(name="says-no", body=CHECK + "return 'no GPU here'"),
        "no GPU here",
    ),
    "bad-check": (
        BACKEND.format(name="bad-check", body=CHECK + "raise OSError('libx.so')"),
        "its check failed: OSError: libx.so",
    ),
    "bad-words": (BACKEND.format(name="bad-words", body="formats = 7\n    " + LOAD), "describes itself wrongly"),
}


def listed(environment: dict[str, str]) -> dict[str, dict[str, object]]:
    command = [sys.executable, "-m", "rbee.worker", "plugins", "--json"]
    ended = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=True
    )
    return {one["name"]: one for one in json.loads(ended.stdout)}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_says_what_is_wrong_and_hides_no_other(name: str, tmp_path: Path) -> None:
    source, problem = BROKEN[name]
    environment = install(tmp_path, name, source)
    found = listed(environment)
    assert problem in str(found[name]["problem"])
    assert found[name]["package"] == f"rbee-{name}"
    assert found["echo"]["problem"] == ""
    with started_worker(WorkerSpec(name="x", backend=name, model="x"), env=environment) as worker:
        if name == "bad-words":
            return
        assert worker.wait() == 1
        assert problem in worker.log
        assert "Traceback" not in worker.log
        assert len(worker.log.splitlines()) == 1


def test_a_plugin_of_a_test_runs(tmp_path: Path) -> None:
    environment = install(tmp_path, "fine", BACKEND.format(name="fine", body=LOAD))
    found = listed(environment)["fine"]
    assert (found["problem"], found["version"], found["shape"]) == ("", "1.2.3", "answers")


def test_what_is_installed_is_described() -> None:
    found = listed({})
    assert found["echo"]["capabilities"] == ["chat", "completion", "embedding", "rerank"]
    assert "delay_ms" in found["echo"]["options"]  # type: ignore[operator]
    assert found["xllamacpp"]["shape"] == "serves"
    assert found["xllamacpp"]["formats"] == ["gguf"]
