"""The catalog's file survives what happens to files."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tinydb import TinyDB

from rbee.errors import SetupProblem
from rbee.hive.storage import AtomicStorage

ROUNDS = 40
WRITER = """
import sys
from pathlib import Path
from tinydb import TinyDB
from rbee.hive.storage import AtomicStorage
database = TinyDB(Path(sys.argv[1]), storage=AtomicStorage)
table = database.table("models")
number = max((row["number"] for row in table), default=0)
while True:
    number += 1
    table.insert({"number": number, "filling": "x" * 20_000})
    if len(table) > 40:
        table.remove(doc_ids=[min(row.doc_id for row in table)])
    print(number, flush=True)
"""


def test_forty_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    file, seed = tmp_path / "catalog.json", random.randrange(2**32)
    choose = random.Random(seed)
    acknowledged = 0
    for round_ in range(ROUNDS):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(choose.randrange(1, 12)):
                acknowledged = int(writer.stdout.readline())
            writer.kill()
            rest = writer.stdout.read().split()
            acknowledged = max([acknowledged, *(int(number) for number in rest)])
        database = TinyDB(file, storage=AtomicStorage)
        numbers = [row["number"] for row in database.table("models")]
        assert acknowledged in numbers, f"round {round_}, seed {seed}: {acknowledged} is not among {numbers[-3:]}"
        assert isinstance(database.storage, AtomicStorage)
        assert not database.storage.problem
        database.close()
    assert not list(tmp_path.glob("*.damaged-*"))
    assert not list(tmp_path.glob("*.tmp"))


def _write(path: Path, *contents: str) -> None:
    database = TinyDB(path, storage=AtomicStorage)
    for content in contents:
        database.table("models").insert({"name": content})
    database.close()


def _names(path: Path) -> tuple[list[str], str]:
    database = TinyDB(path, storage=AtomicStorage)
    names = [row["name"] for row in database.table("models")]
    assert isinstance(database.storage, AtomicStorage)
    problem = database.storage.problem
    database.close()
    return names, problem


@pytest.mark.parametrize("damage", [b"", b'{"models": {"1": {"na', b"\0" * 4096, b"[1, 2]", b"\xff\xfe"])
def test_a_damaged_file_is_replaced_from_the_backup_and_kept(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "catalog.json"
    _write(file, "first", "second", "third")
    file.write_bytes(damage)
    names, problem = _names(file)
    assert names == ["first", "second"]
    assert str(file) in problem
    (kept,) = tmp_path.glob("*.damaged-*")
    assert kept.read_bytes() == damage
    assert kept.name in problem
    assert _names(file) == (["first", "second"], ""), "the file itself is whole again"


def test_a_missing_file_comes_back_from_the_backup(tmp_path: Path) -> None:
    file = tmp_path / "catalog.json"
    _write(file, "first", "second", "third")
    file.unlink()
    names, problem = _names(file)
    assert names == ["first", "second"]
    assert "missing" in problem


def test_when_both_are_damaged_it_starts_empty_and_loses_neither(tmp_path: Path) -> None:
    file = tmp_path / "catalog.json"
    _write(file, "first", "second")
    file.write_bytes(b"{")
    (tmp_path / "catalog.json.bak").write_bytes(b"{{")
    names, problem = _names(file)
    assert names == []
    assert "starts empty" in problem
    _write(file, "new", "newer")
    kept = sorted(path.read_bytes() for path in tmp_path.glob("*.damaged-*"))
    assert kept == [b"{", b"{{"]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "catalog.json"
    first = TinyDB(file, storage=AtomicStorage)
    with pytest.raises(SetupProblem, match=r"Another process writes .*catalog\.json"):
        TinyDB(file, storage=AtomicStorage)
    first.close()
    TinyDB(file, storage=AtomicStorage).close()


def test_a_full_disk_is_an_error_and_the_content_stays(tmp_path: Path) -> None:
    file = tmp_path / "catalog.json"
    _write(file, "first", "second")
    before = file.read_bytes()
    database = TinyDB(file, storage=AtomicStorage)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(SetupProblem, match="Cannot write"):
            database.table("models").insert({"name": "x" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert file.read_bytes() == before
    database.table("models").insert({"name": "third"})
    database.close()
    assert _names(file) == (["first", "second", "third"], "")


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    _write(tmp_path / "catalog.json", "first", "second")
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}
