"""The list of engines, made by a child process and kept."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hive_rig import ENGINES, FakeQueen, StartHive, install, until

from rbee.errors import RbeeError
from rbee.hive.engines import Engines
from rbee.wire.fleet import HiveReport

LISTING = """
import pathlib, sys
runs = pathlib.Path(sys.argv[1]); runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
print('[{"name": "one", "problem": "%s"}]' % sys.argv[2])
"""


def engines_of(tmp_path: Path, problem: str = "", script: str = LISTING) -> Engines:
    command = (sys.executable, "-c", script, str(tmp_path / "runs"), problem)
    return Engines(tmp_path / "cache/engines.json", tmp_path / "logs/engines.log", command, lambda: None)


def runs(tmp_path: Path) -> int:
    return len((tmp_path / "runs").read_text())


def test_a_list_is_made_once_for_what_is_installed(tmp_path: Path) -> None:
    for _ in range(3):
        engines = engines_of(tmp_path)
        engines.refresh()
        engines.refresh()
        assert [engine.name for engine in engines.reports()] == ["one"]
    assert runs(tmp_path) == 1


def test_a_problem_is_looked_at_again_at_the_next_start(tmp_path: Path) -> None:
    engines_of(tmp_path, problem="it lacks libx").refresh()
    engines = engines_of(tmp_path)
    engines.refresh()
    assert engines.reports()[0].problem == ""
    assert runs(tmp_path) == 2


def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    engines_of(tmp_path).refresh()
    (tmp_path / "cache/engines.json").write_text('{"key": [')
    engines = engines_of(tmp_path)
    engines.refresh()
    assert engines.reports()


@pytest.mark.parametrize(
    ("script", "words"),
    [("print('hello')", "no list"), ("raise SystemExit(3)", "exit code 3"), ("import os; os.abort()", "SIGABRT")],
)
def test_a_listing_that_fails_is_told_and_tried_again(tmp_path: Path, script: str, words: str) -> None:
    engines = engines_of(tmp_path, script=script)
    engines.refresh()
    assert engines.wait(0)
    assert words in engines.problem
    assert str(tmp_path / "logs/engines.log") in engines.problem


def test_a_listing_that_never_ends_is_ended(tmp_path: Path) -> None:
    engines = engines_of(tmp_path, script="import time; time.sleep(600)")
    engines.start()
    until(lambda: engines.is_listing(), "the listing to start")
    engines.stop()
    until(lambda: not engines.is_listing(), "the listing to end")


def test_a_plugin_that_breaks_in_import_is_a_problem_of_its_own(start_hive: StartHive, plugins: Path) -> None:
    (plugins / "broken_trial.py").write_text("print('noise on stdout')\nraise RuntimeError('no such chip')\n")
    install(plugins, {**ENGINES}, version="2")
    broken = plugins / "broken_trial.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-trial\nVersion: 1\n")
    (broken / "entry_points.txt").write_text("[rbee.backends]\nbroken = broken_trial:Broken\n")
    hive = start_hive("--ephemeral")
    assert hive.ready("trial")
    with pytest.raises(RbeeError, match="no such chip"):
        hive.spawn("rbee-demo", "broken")


def test_the_second_start_knows_the_engines_from_its_first_report(start_hive: StartHive, plugins: Path) -> None:
    install(plugins, {"trial": "Trial"})
    first = start_hive()
    until(lambda: first.client.get("/v1/hive", HiveReport).engines, "the list of engines")
    first.terminate()
    queen = FakeQueen()
    start_hive("--ephemeral", "--queen", queen.url)
    until(lambda: queen.reports and queen.reports[-1].engines, "a report with engines")
    queen.close()
