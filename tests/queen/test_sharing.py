"""The parts of sharing that need no other process: ids, slots, shares, one page of metrics, what is asked for."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rbee.errors import InvalidInput, SetupProblem
from rbee.queen import slots
from rbee.queen.adoption import adopt
from rbee.queen.ejection import Ejection
from rbee.queen.ledger import Ended, Ledger
from rbee.queen.merged_metrics import merged
from rbee.queen.owners import Owner, Signature, made_at, owner_of_id, queen_name, timed_id
from rbee.queen.passing import one_page
from rbee.queen.records import open_database, write_ended
from rbee.queen.shared_view import share
from rbee.queen.sharing import sharing_of
from rbee.wire.jobs import FileList, FileObject


def test_an_id_names_its_owner() -> None:
    owner = Owner("k3xap2", 11)
    assert owner_of_id(f"job_18ea0ac67bdd0f8a738dcafaaa_{owner}") == owner
    for plain in ("job_18ea0ac67bdd0f8a738dcafaaa", "file-" + "0" * 32, "batch_" + "f" * 32, "", "_", "job_k3xap2"):
        assert owner_of_id(plain) is None
    now = int(time.time())
    Signature.set(owner)
    try:
        made = timed_id("file-", now)
    finally:
        Signature.set(None)
    assert (owner_of_id(made), made_at(made)) == (owner, now)
    assert len(timed_id("batch_", now)) == len("batch_") + 32
    assert made_at("file-" + "x" * 32) == -1


def test_a_queen_keeps_her_name(tmp_path: Path) -> None:
    path = tmp_path / "queen.name"
    assert queen_name(path) == queen_name(path)
    path.write_text("Not a name")
    with pytest.raises(SetupProblem, match=r"queen.name is damaged"):
        queen_name(path)


TAKE = """
import sys
from pathlib import Path
from rbee.queen import slots
print(slots.take(Path(sys.argv[1]), 2), flush=True)
sys.stdin.read()
"""


def test_a_slot_is_free_again_when_its_process_is_killed(tmp_path: Path) -> None:
    taken = [
        subprocess.Popen(
            [sys.executable, "-c", TAKE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    numbers = []
    try:
        for process in taken:
            assert process.stdout is not None
            numbers.append(int(process.stdout.readline()))
        assert sorted(numbers) == [0, 1]
        with pytest.raises(slots.NoSlot):
            slots.take(tmp_path, 2, wait_s=0)
        taken[0].kill()
        assert slots.take(tmp_path, 2) == numbers[0]
    finally:
        for process in taken:
            process.kill()
            process.communicate()


def test_a_long_folder_still_has_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / ("long" * 30)
    monkeypatch.setenv("RBEE_HOME", str(home))
    path = slots.socket_path(home / "state", 1)
    assert len(os.fsencode(path)) <= slots.SOCKET_PATH_LIMIT_BYTES
    assert path.parent.stat().st_mode & 0o777 == 0o700
    slots.listen(path).close()
    path.unlink()
    path.parent.rmdir()


@pytest.mark.parametrize(
    ("slots", "demands", "shares"),
    [
        (8, {"a": 2}, {"a": 8}),
        (8, {"a": 0, "b": 8}, {"a": 1, "b": 8}),
        (8, {"a": 2, "b": 3}, {"a": 5, "b": 6}),
        (8, {"a": 8, "b": 8}, {"a": 4, "b": 4}),
        (8, {"a": 30, "b": 10, "c": 0}, {"a": 6, "b": 2, "c": 1}),
        (3, {"a": 5, "b": 5, "c": 5, "d": 5}, {"a": 1, "b": 1, "c": 1, "d": 1}),
    ],
)
def test_each_process_takes_its_share_of_the_slots(slots: int, demands: dict[str, int], shares: dict[str, int]) -> None:
    assert {name: share(slots, name, demands) for name in demands} == shares


def test_shares_never_are_more_than_the_slots_when_all_want_many() -> None:
    for slots_ in range(4, 40):
        for demands in ({"a": 50, "b": 70, "c": 41}, {"a": 40, "b": 41, "c": 42, "d": 43}):
            assert sum(share(slots_, name, demands) for name in demands) == slots_


class Pair:
    """A worker as two processes know it, who tell each other, at a time of the test's own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.one = Ejection(now=lambda: self.now, tell=lambda event, pause_s: self.other.hear(event, pause_s))
        self.other = Ejection(now=lambda: self.now, tell=lambda event, pause_s: self.one.hear(event, pause_s))

    def ejected(self) -> tuple[bool, bool]:
        return self.one.ejected, self.other.ejected


def test_five_failures_in_all_eject_a_worker_everywhere() -> None:
    pair = Pair()
    for _ in range(3):
        pair.one.failed()
    pair.other.failed()
    assert pair.ejected() == (False, False)
    pair.other.failed()
    assert pair.ejected() == (True, True)
    pair.one.began()
    assert pair.ejected() == (False, False)


def test_a_success_anywhere_ends_a_row_of_failures() -> None:
    pair = Pair()
    for _ in range(4):
        pair.one.failed()
    pair.other.succeeded()
    pair.one.failed()
    assert pair.ejected() == (False, False)


def test_only_one_process_probes_a_worker() -> None:
    pair = Pair()
    for _ in range(5):
        pair.one.failed()
    pair.now = 2.0
    assert pair.ejected() == (False, False)
    pair.one.sent()
    assert pair.ejected() == (True, True)
    pair.one.failed()
    pair.now = 5.9
    assert pair.ejected() == (True, True)
    pair.now = 6.0
    pair.one.sent()
    pair.one.began()
    assert pair.ejected() == (False, False)


def test_a_process_that_dies_while_it_probes_does_not_leave_a_worker_out_for_ever() -> None:
    pair = Pair()
    for _ in range(5):
        pair.one.failed()
    pair.now = 2.0
    pair.one.sent()
    pair.now = 11.9
    assert pair.other.ejected
    pair.now = 12.0
    assert pair.ejected() == (True, False)


PAGE = """# HELP rbee_jobs_total Jobs.
# TYPE rbee_jobs_total counter
rbee_jobs_total{model="a b"} %d.0
# HELP rbee_jobs_in_flight Jobs in the queen.
# TYPE rbee_jobs_in_flight gauge
rbee_jobs_in_flight %d.0
# TYPE rbee_worker_jobs gauge
rbee_worker_jobs %d.0
# TYPE rbee_records_available gauge
rbee_records_available %d.0
# TYPE rbee_seconds histogram
rbee_seconds_bucket{le="+Inf"} %d.0
rbee_seconds_sum 0.5
"""


def test_pages_of_metrics_are_one() -> None:
    page = merged([(PAGE % (3, 2, 5, 1, 3)).encode(), (PAGE % (4, 1, 7, 0, 4) + "rbee_more 1.0\n").encode()]).decode()
    for line in (
        'rbee_jobs_total{model="a b"} 7.0',
        "rbee_jobs_in_flight 3.0",
        "rbee_worker_jobs 7.0",
        "rbee_records_available 0.0",
        'rbee_seconds_bucket{le="+Inf"} 7.0',
        "rbee_seconds_sum 1.0",
        "rbee_more 1.0",
    ):
        assert page.count(f"{line}\n") == 1
    assert page.count("# TYPE rbee_jobs_total counter\n") == 1


def test_pages_of_a_list_are_one() -> None:
    def file(number: int, at: int) -> FileObject:
        return FileObject(id=f"file-{number}", bytes=1, created_at=at, filename="f", purpose="batch")

    first = FileList(data=[file(5, 30), file(1, 10)], has_more=True)
    second = FileList(data=[file(7, 30), file(3, 20)])
    page = one_page([first, second], 3)
    assert [one.id for one in page.data] == ["file-7", "file-5", "file-3"]
    assert (page.has_more, page.first_id, page.last_id) == (True, "file-7", "file-3")
    assert one_page([FileList(data=[]), FileList(data=[])], 3) == FileList(data=[])


def test_records_are_taken_over_whole_and_once(tmp_path: Path) -> None:
    folder, orphan = tmp_path / "records", tmp_path / "records" / "process-1"
    (orphan / "files").mkdir(parents=True)
    (orphan / "files" / "file-1").write_bytes(b"bytes")
    other = open_database(orphan / "records.sqlite")
    other.execute("INSERT INTO files VALUES ('file-1', 'key:k', 'name', 'batch', 5, 1.0)")
    other.close()
    ledger = Ledger(orphan)
    ledger.add(Ended("job_1", "key:k", "k", "/v1/completions", "m", "completed", 1.0, 2.0, "w", 3, 4))
    ledger.close()
    db = open_database(folder / "records.sqlite")
    before = sqlite3.connect(orphan / "records.sqlite")
    before.close()
    adopt(db, folder, [orphan], open_database, write_ended)
    adopt(db, folder, [orphan], open_database, write_ended)
    assert db.execute("SELECT id, prompt_tokens FROM jobs").fetchall() == [("job_1", 3)]
    assert db.execute("SELECT job, completion_tokens FROM usage").fetchall() == [("job_1", 4)]
    assert db.execute("SELECT id FROM files").fetchall() == [("file-1",)]
    assert (folder / "files" / "file-1").read_bytes() == b"bytes"
    assert not orphan.exists()
    db.close()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((0, "", None, ""), "--processes must be between 1 and 64"),
        ((2, "", None, ""), "2 server processes need a place for what they share"),
        ((1, "", None, "http://a:1"), "needs a state to share"),
        ((1, "http://127.0.0.1:6379", None, ""), "is not the address of a Redis"),
        ((1, "redis://:sesame@127.0.0.1:6379", None, ""), "A password does not belong into the address"),
        ((1, "redis://127.0.0.1:6379", None, "ftp://here"), "--advertise 'ftp://here' is not an address"),
    ],
)
def test_what_is_wrong_with_sharing_is_said(asked: tuple[int, str, None, str], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        sharing_of(*asked)


def test_a_password_is_in_a_private_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("sesame\n")
    file.chmod(0o644)
    with pytest.raises(SetupProblem, match=f"chmod 600 {file}"):
        sharing_of(2, "redis://127.0.0.1", file, "")
    file.chmod(0o600)
    assert sharing_of(2, "redis://127.0.0.1", file, "http://here:1/") == {
        "processes": 2,
        "state": "redis://127.0.0.1",
        "state_password": "sesame",
        "advertise": "http://here:1",
    }
