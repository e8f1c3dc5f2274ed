"""Random scripts never bring the process down nor raise anything but a rhai.Error."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = 6000
HANG_GUARD_S = 600


@pytest.mark.parametrize("seed", [1, 2])
def test_random_scripts(seed: int) -> None:
    command = [sys.executable, str(Path(__file__).parent / "fuzz.py"), str(seed), str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_GUARD_S, check=False)

    assert done.returncode == 0, done.stderr[-4000:]
    # A fuzzer whose scripts all fail to compile would only test the parser.
    assert int(done.stdout) > CASES / 20
