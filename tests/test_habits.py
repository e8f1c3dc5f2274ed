"""The house rules that a machine can check: types, style, the direction of imports, and what a commit may name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["rbee", "deploys", "plugins", "tests", "bench", "training", "rhai-py/python"]


def run(*command: str, **variables: str) -> None:
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is not installed in this environment: pip install -e '.[dev]'"
    return found


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [path for name in done.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_style() -> None:
    run(tool("ruff"), "check", *SOURCES)
    run(tool("ruff"), "format", "--check", *SOURCES)


FOLDERS = [str(path.relative_to(ROOT)) for place in ("tests", "plugins") for path in sorted((ROOT / place).iterdir())
           if path.is_dir() and path.name not in ("__pycache__", "data")]  # fmt: skip


@pytest.mark.parametrize("what", ["rbee", "deploys", "bench", *FOLDERS])
def test_types(what: str) -> None:
    # Tests import what lies beside them.
    beside = ROOT / what / "tests" if (ROOT / what / "tests").is_dir() else ROOT / what
    rigs = ":".join(str(ROOT / "tests" / part) for part in ("hosts", "queen", "."))
    known = {"rbee": "", "deploys": "", "bench": rigs}
    run(tool("mypy"), what, MYPYPATH=known.get(what, f"{beside}:{ROOT / 'tests'}"))


def test_imports_go_one_way() -> None:
    run(tool("lint-imports"))


def test_no_download_address_or_weights_too_large() -> None:
    assert not [path for path in tracked() if path.name in {"uv.lock", "poetry.lock", "pdm.lock"}]
    assert not [path for path in tracked() if path.stat().st_size > 4 * 1024 * 1024]


def test_constraints_name_versions_only() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.match(r"^[a-z0-9._-]+==[\w.+!]+( ; .+)?$", line), line
