"""The tests of the inventory import what lies beside them, and act as the person of the command line's tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
