"""Scripts written to do harm end in a rhai.Error, or in a value, and never with the process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = sorted((HERE / "hostile").glob("*.rhai"))
HANG_GUARD_S = 120


def run(script: Path, stack_kib: int) -> str:
    command = [sys.executable, str(HERE / "run_hostile.py"), str(script), str(stack_kib)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_GUARD_S, check=False)
    assert done.returncode == 0, f"the process ended with {done.returncode}: {done.stderr}"
    assert done.stderr == ""
    return done.stdout.strip()


def expected(script: Path) -> str:
    found = re.match(r"// expect: (.+)\n", script.read_text(encoding="utf-8"))
    assert found, f"{script.name} does not start with a line '// expect: ...'"
    return found[1]


@pytest.mark.parametrize("stack_kib", [256, 8192], ids=["small-stack", "large-stack"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_hostile_script_is_contained(script: Path, stack_kib: int) -> None:
    ended = run(script, stack_kib)

    # "LimitError" alone stands where it depends on the speed of the machine which limit is reached first.
    assert ended.startswith(expected(script))
