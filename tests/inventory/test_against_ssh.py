"""`ssh -G` is the judge: over random files, what applies to a host is what ssh says."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from inventory_random import LISTS, NAMES, SCALARS, Writer

from rbee.inventory.evaluate import Evaluation, evaluate
from rbee.inventory.parse import parse
from rbee.inventory.world import this_machine

FILES = int(os.environ.get("RBEE_RANDOM_FILES", "300"))
FIRST = int(os.environ.get("RBEE_RANDOM_FIRST", "0"))
PORTION = 20
Values = dict[str, list[str]]

pytestmark = pytest.mark.skipif(shutil.which("ssh") is None, reason="the judge, ssh, is not installed")


def ssh_says(file: Path | str, name: str) -> Values | None:
    """Return what ssh -G prints, or None where ssh refuses the file."""
    done = subprocess.run(["ssh", "-G", "-F", str(file), name], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return None
    found: Values = {}
    for line in done.stdout.splitlines():
        keyword, _, value = line.partition(" ")
        found.setdefault(keyword, []).append(value)
    return {keyword: found.get(keyword, []) for keyword in compared()}


def compared() -> list[str]:
    return [keyword.lower() for keyword in (*SCALARS, *LISTS)]


def we_say(file: Path, name: str) -> Values | None:
    """Return the same from our own evaluation."""
    world = this_machine()
    config = parse([file], world)
    evaluation = evaluate(config, name, world)
    if config.mistakes or evaluation.failures:
        return None
    found = ssh_says("/dev/null", name)
    assert found is not None
    return {**found, **_ours(evaluation)}


def _ours(evaluation: Evaluation) -> Values:
    found = {"hostname": [evaluation.hostname]}
    for keyword in compared():
        lines = evaluation.lines.get(keyword)
        if lines and keyword in {name.lower() for name in LISTS}:
            # The same file is tried once.
            found[keyword] = list(dict.fromkeys(line.words[0] for line in lines))
        elif lines and keyword != "hostname":
            found[keyword] = [lines[0].words[0]]
    return found


@pytest.mark.parametrize("portion", range(FIRST, FIRST + FILES, PORTION))
def test_random_files_mean_to_us_what_they_mean_to_ssh(portion: int, tmp_path: Path) -> None:
    for seed in range(portion, portion + PORTION):
        folder = tmp_path / str(seed)
        folder.mkdir()
        file = Writer(seed, folder).write()
        for name in NAMES[seed % 2 :: 2]:
            assert we_say(file, name) == ssh_says(file, name), f"seed {seed}, {name}, {file}"


def test_random_files_are_not_all_alike(tmp_path: Path) -> None:
    # A generator whose files ssh refuses, or that set nothing, would prove nothing.
    refused = varied = 0
    for seed in range(60):
        folder = tmp_path / str(seed)
        folder.mkdir()
        file = Writer(seed, folder).write()
        said = ssh_says(file, "alpha")
        refused += said is None
        varied += said is not None and said != ssh_says("/dev/null", "alpha")
    assert 0 < refused < 20 < varied
