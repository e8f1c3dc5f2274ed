"""Machines for tests: a network a session, machines a module or a test.

Where they cannot be had (not root, a tool missing, no mirror) these tests are skipped with the reason;
RBEE_REQUIRE_HOSTS=1 makes that a failure.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from machines import Machine, Rig, RigProblem, base_tree, started_rig, why_no_machines

HERE = Path(__file__).parent
REASON = pytest.StashKey[str]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the base tree before the first test, outside of its time limit."""
    if session.config.option.collectonly or not any(HERE in item.path.parents for item in session.items):
        return
    reason = why_no_machines()
    try:
        if not reason:
            base_tree(lambda line: tell(session.config, line))
    except RigProblem as problem:
        reason = str(problem)
    session.config.stash[REASON] = reason


def tell(config: pytest.Config, line: str) -> None:
    """Show a line of progress though the tests' own output is captured."""
    if reporter := config.pluginmanager.get_plugin("terminalreporter"):
        reporter.write_line(line)


@pytest.fixture(scope="session")
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Return this session's network for machines."""
    reason = request.config.stash[REASON]
    with ExitStack() as stack:
        try:
            made = None if reason else stack.enter_context(started_rig(base_tree(lambda line: None)))
        except RigProblem as problem:
            made, reason = None, str(problem)
        if made is None:
            absent = pytest.fail if os.environ.get("RBEE_REQUIRE_HOSTS") == "1" else pytest.skip
            absent(reason)
        yield made


@pytest.fixture(scope="module")
def machine(rig: Rig) -> Iterator[Machine]:
    """Return a machine that the module's tests share and leave well."""
    with rig.machines(1) as [made]:
        yield made


@pytest.fixture
def fresh_machine(rig: Rig) -> Iterator[Machine]:
    """Return a machine that only this test touches."""
    with rig.machines(1) as [made]:
        yield made


@pytest.fixture
def machines(rig: Rig) -> Iterator[Callable[[int], list[Machine]]]:
    """Return what boots so many machines that only this test touches."""
    with ExitStack() as stack:
        yield lambda count: stack.enter_context(rig.machines(count))
