"""The fixtures of the queen's tests; what they hand out is in `queen_rig`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from queen_rig import FleetFolder


@pytest.fixture
def fleet(tmp_path: Path) -> FleetFolder:
    """Return an empty inventory folder with the identity of a fleet."""
    return FleetFolder(tmp_path / "inventory")
