"""The fixtures of the command line's tests; what they hand out is in `cli_rig` and `cli_fake_queen`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cli_fake_queen import Answering, FakeQueen
from cli_rig import Person


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    """Someone with an empty home, in which no process may be left at the end."""
    # A short path: the socket of an engine lies below it, and sun_path is short (unix(7)).
    home = Path(tempfile.mkdtemp(prefix="rbee-cli-"))
    folder = tmp_path / "folder"
    folder.mkdir()
    someone = Person(home, folder)
    try:
        yield someone
        if someone.processes():
            someone.rbee("queen", "stop")
        left = someone.processes()
        assert not left, f"left behind: {left}"
    finally:
        for pid in someone.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def fake_queen() -> Iterator[Callable[[Answering], FakeQueen]]:
    """Start a queen that answers as a test tells it to."""
    started: list[FakeQueen] = []

    def start(answer: Answering) -> FakeQueen:
        started.append(FakeQueen(answer))
        return started[-1]

    yield start
    for queen in started:
        queen.close()
