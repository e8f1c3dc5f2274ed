"""What tests of the running programs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rbee.testing.programs import RunningQueen, running_queen


@pytest.fixture(scope="session")
def queen() -> Iterator[RunningQueen]:
    """Return a running queen with a hive, shared by the tests that leave it well."""
    with running_queen() as running:
        yield running
