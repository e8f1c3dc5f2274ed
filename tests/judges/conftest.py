"""The judges: programs that others wrote, pointed at a running queen as their users would point them."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import anthropic
import openai
import pytest

from rbee.testing.programs import RunningQueen, running_queen

sys.path.insert(0, str(Path(__file__).parent))

from rbee_judges import HANG_GUARD_S, StartEcho, connect, end_echo, spawn_echo


@pytest.fixture(scope="session")
def client(queen: RunningQueen) -> Iterator[openai.OpenAI]:
    """The `openai` package, connected to the shared queen."""
    with connect(queen.url) as made:
        yield made


@pytest.fixture(scope="session")
def claude(queen: RunningQueen) -> Iterator[anthropic.Anthropic]:
    """The `anthropic` package as the README sets it up; it never tries again by itself."""
    with anthropic.Anthropic(base_url=queen.url, api_key="local", max_retries=0, timeout=HANG_GUARD_S) as made:
        yield made


@pytest.fixture(scope="session")
def judge() -> Callable[[str], str]:
    """Find a judge's command line program beside this Python."""
    return lambda name: str(Path(sysconfig.get_path("scripts")) / name)


@pytest.fixture(scope="module")
def own_queen() -> Iterator[RunningQueen]:
    """A queen of this module's own, whose echo workers may be slow or broken."""
    with running_queen() as running:
        yield running


@pytest.fixture
def start_echo(own_queen: RunningQueen) -> Iterator[StartEcho]:
    """Start the one echo worker of the module's queen, with options; it ends with the test."""
    started: list[str] = []

    def start(**options: str) -> str:
        started.append(spawn_echo(own_queen, **options))
        return started[-1]

    yield start
    for name in started:
        end_echo(own_queen, name)
