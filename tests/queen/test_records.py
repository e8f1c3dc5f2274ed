"""The database thread and the ledger: what is told is on the disk, and what cannot be written is refused."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import gevent
import pytest

from rbee.errors import NotFound, StorageProblem
from rbee.queen import records as records_module
from rbee.queen.ledger import Ended, Ledger
from rbee.queen.records import Records
from rbee.queen.retention import Retention


def ended(number: int, at: float | None = None) -> Ended:
    now = time.time() if at is None else at
    return Ended(f"job_{number:04d}", "key:k", "k", "/v1/chat/completions", "m", "completed", now, now, "h/w", 3, 4)


def count(folder: Path, table: str) -> int:
    with closing(sqlite3.connect(folder / "records.sqlite")) as db:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    made = Records(tmp_path / "records")
    with closing(made):
        yield made


def test_those_who_wait_at_once_share_one_commit(records: Records) -> None:
    records.call(lambda db: db.execute("CREATE TABLE t (a)") and None)
    commits: list[str] = []
    records.call(lambda db: db.set_trace_callback(lambda text: commits.append(text) if text == "COMMIT" else None))
    commits.clear()
    writers = [gevent.spawn(records.call, lambda db, n=n: db.execute("INSERT INTO t VALUES (?)", (n,)) and n)
               for n in range(100)]  # fmt: skip
    gevent.joinall(writers)
    records.call(lambda db: db.set_trace_callback(None))
    assert [writer.value for writer in writers] == list(range(100))
    assert len(commits) <= 3
    assert records.call(lambda db: db.execute("SELECT count(*) FROM t").fetchone()[0]) == 100


def test_an_operation_that_fails_undoes_its_own_and_nothing_else(records: Records) -> None:
    def fails(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO files VALUES ('a', 'o', 'f', 'p', 1, 1)")
        raise NotFound("no")

    good = gevent.spawn(
        records.call, lambda db: db.execute("INSERT INTO files VALUES ('b', 'o', 'f', 'p', 1, 1)") and 1
    )
    with pytest.raises(NotFound):
        records.call(fails)
    good.join()
    assert records.call(lambda db: db.execute("SELECT id FROM files").fetchall()) == [("b",)]


def test_a_row_is_counted_once_however_often_it_comes(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    with closing(Records(folder)) as records:
        for number in [1, 2, 2, 1]:
            records.ended(ended(number))
        assert records.call(lambda db: db.execute("SELECT count(*) FROM usage").fetchone()[0]) == 2
    ledger = Ledger(folder)
    for number in range(1, 4):
        ledger.add(ended(number))
    ledger.close()
    with closing(Records(folder)) as records:
        assert records.call(lambda db: db.execute("SELECT sum(prompt_tokens) FROM usage").fetchone()[0]) == 9
    assert count(folder, "jobs") == 3


KILLED = """
import os, sys, time
from pathlib import Path
from rbee.queen.ledger import Ended, Ledger
ledger = Ledger(Path(sys.argv[1]))
for number in range(50):
    ledger.add(Ended(f"job_{number:04d}", "key:k", "k", "e", "m", "completed", 1.0, time.time(), "h/w", 3, 4))
os.kill(os.getpid(), 9)
"""


def test_the_ledger_of_a_killed_process_is_taken_up(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False).returncode == -9
    with (folder / "ended-a.jsonl").open("ab") as file:
        file.write(b'["job_cut","key')
    with closing(Records(folder)) as records:
        assert records.call(lambda db: db.execute("SELECT count(*) FROM usage").fetchone()[0]) == 50
    assert count(folder, "jobs") == 50
    assert sum(path.stat().st_size for path in folder.glob("ended-*.jsonl")) == 0


def test_what_cannot_be_written_is_refused_and_made_up_for(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "RETRY_S", 0.01)
    records.call(lambda db: db.execute("PRAGMA max_page_count = 1") and None)
    large = "INSERT INTO answers VALUES ('o', 'k', x'00', 'j', 1, 't', zeroblob(99999), 1)"
    with pytest.raises(StorageProblem, match="full"):
        records.call(lambda db: db.execute(large))
    records.ended(ended(1))
    with pytest.raises(StorageProblem, match="full"):
        records.check()
    records._db.execute("PRAGMA max_page_count = 100000")  # type: ignore[union-attr]  # as when space was made
    with gevent.Timeout(30):
        while records.problem:
            gevent.sleep(0.01)
    records.check()
    assert records.call(lambda db: db.execute("SELECT count(*) FROM usage").fetchone()[0]) == 1


def test_a_second_process_waits_for_the_first(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "RETRY_S", 0.01)
    monkeypatch.setattr(records_module, "ANSWER_TIMEOUT_S", 0.3)
    records.call(lambda db: None)
    second = Records(records.folder)
    with closing(second):
        with pytest.raises(StorageProblem):
            second.call(lambda db: None)
        with pytest.raises(StorageProblem, match="another process"):
            second.check()
        second.ended(ended(7))
        records.close()
        monkeypatch.setattr(records_module, "ANSWER_TIMEOUT_S", 30)
        assert second.call(lambda db: db.execute("SELECT count(*) FROM usage").fetchone()[0]) == 1


def test_what_is_too_old_goes(tmp_path: Path) -> None:
    folder, day = tmp_path / "records", 86400.0
    with closing(Records(folder, Retention(jobs_s=10 * day, results_s=day, usage_s=20 * day))) as records:
        for number, days in enumerate((0.5, 5, 15, 25)):
            records.ended(ended(number, time.time() - days * day))
        records.call(lambda db: db.execute("UPDATE jobs SET response = x'00'") and None)
        records._prune()
        kept = records.call(lambda db: db.execute("SELECT id, response IS NULL FROM jobs ORDER BY id").fetchall())
        assert kept == [("job_0000", 0), ("job_0001", 1)]
        assert records.call(lambda db: db.execute("SELECT count(*) FROM usage").fetchone()[0]) == 3
