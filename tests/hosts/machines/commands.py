"""How the rig runs the controller's commands and waits for what they cause."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

HANG_GUARD_S = 120.0


class RigProblem(Exception):
    """The rig could not do its part; the message says which command failed and how."""


def run(*command: str, stdin: str = "", timeout_s: float = HANG_GUARD_S) -> str:
    """Run a command on the controller and return its output; RigProblem when it fails."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise RigProblem(f"`{' '.join(command)}` did not end within {timeout_s:.0f} s") from None
    if done.returncode != 0:
        raise RigProblem(f"`{' '.join(command)}` failed ({done.returncode}): {(done.stderr or done.stdout).strip()}")
    return done.stdout


def wait_until(happened: Callable[[], bool], what: str, timeout_s: float = HANG_GUARD_S) -> None:
    """Return as soon as `happened()`; RigProblem when it has not within the hang guard."""
    end = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > end:
            raise RigProblem(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.02)
