"""`schemathesis` sends what the queen's own `/openapi.json` allows and forbids, and reads every answer against it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rbee.testing.programs import RunningQueen, running_queen

CONTROL = "^/v1/(orchestrator|hives)"
FIND = Callable[[str], str]


@pytest.mark.timeout(600)  # generates hundreds of requests
def test_the_public_endpoints_keep_their_schema(judge: FIND, tmp_path: Path) -> None:
    with running_queen() as queen:
        # DELETE cancels a job, and its record stays, as that of a cancelled batch does with OpenAI.
        kept = ("--exclude-checks", "use_after_free")
        run(judge("schemathesis"), queen, tmp_path, "--exclude-path-regex", CONTROL, *kept)


@pytest.mark.timeout(600)
def test_the_control_endpoints_keep_their_schema(judge: FIND, tmp_path: Path) -> None:
    with running_queen() as queen:
        run(
            judge("schemathesis"),
            queen,
            tmp_path,
            *("--header", f"Authorization: Bearer {queen.record.token}", "--include-path-regex", CONTROL),
            # Ends the queen.
            *("--exclude-path", "/v1/orchestrator/shutdown"),
            # Starts real workers: one with 1024 slots of 16 million tokens takes all memory of this machine.
            *("--exclude-path", "/v1/hives/{hive}/workers"),
            # Whether a path is a model file, and a name one that may be removed, only the hive's disk knows.
            *("--exclude-checks", "positive_data_acceptance"),
        )
        assert queen.status().hives


@pytest.mark.timeout(600)
def test_what_hives_report_keeps_its_schema(judge: FIND, tmp_path: Path) -> None:
    with running_queen() as queen:
        token = (queen.home / "state" / "hive.token").read_text().strip()
        run(
            judge("schemathesis"),
            queen,
            tmp_path,
            *("--header", f"Authorization: Bearer {token}"),
            *("--include-path", "/v1/orchestrator/hive-report", "--include-path", "/v1/orchestrator/worker-ready"),
        )
        # What it made up is believed; the queen still lists it all.
        assert queen.status().hives


def run(program: str, queen: RunningQueen, folder: Path, *arguments: str) -> None:
    """Run all checks with a fixed seed. Raises: AssertionError with the report of what failed."""
    command = [program, "run", f"{queen.url}/openapi.json", "--no-color", "--max-examples", "20", "--seed", "1"]
    command += ["--generation-database", "none", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=folder)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
