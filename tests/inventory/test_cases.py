"""What inventories mean, and what is said of their mistakes: each file in `cases/` is a test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from inventory_cases import CASES, lay_out

FILES = sorted(CASES.glob("*.case"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_inventory_means(file: Path, tmp_path: Path) -> None:
    case, expected = lay_out(file, tmp_path)
    assert case.outcome(expected["ssh"]) == expected


@pytest.mark.skipif(shutil.which("ssh") is None, reason="the judge, ssh, is not installed")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_ssh_accepts_or_refuses_the_same_file(file: Path, tmp_path: Path) -> None:
    case, expected = lay_out(file, tmp_path)
    assert case.ssh_accepts() == expected["ssh"]
    # What ssh refuses is said by rbee too, as a mistake or as a warning.
    assert expected["ssh"] or expected.get("mistakes") or expected.get("warnings")
