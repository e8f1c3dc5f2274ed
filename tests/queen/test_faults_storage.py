"""A disk that is full or read-only, a database that somebody locks: said at once, and over as soon as it is over."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from job_calls import FINAL, call, rows
from queen_rig import FleetFolder, until_state

from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, end, running_queen, until

CHAT = "/v1/chat/completions"
WORDS = 300
DISK_BYTES = 8 << 20


def chat(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": "honey", "messages": [{"role": "user", "content": text}], **fields}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a small disk of its own on a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "rbee-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Callable[[], None]:
    """Use a disk up, and return what gives the room back."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler.unlink


def forbid(disk: Path) -> Callable[[], None]:
    """Make a disk read-only, and return what ends that."""

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

    remount("ro")
    return lambda: remount("rw")


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server(word_s=0.02) as running:
        yield running


@contextlib.contextmanager
def queen_at(home: Path, fleet: FleetFolder, server: RunningServer) -> Iterator[RunningQueen]:
    fleet.write(desk=["HivePort none", f"Worker s model=honey slots=16 url={server.url}"])
    with running_queen("--no-hive", "--inventory", str(fleet.folder), home=home) as queen:
        until_state(queen, "desk", "ready")
        yield queen


class Stream:
    """A stream that is read to its end in a thread of its own."""

    def __init__(self, queen: RunningQueen) -> None:
        self.body = b""
        self._connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=120)
        body = chat("word " * WORDS, stream=True, stream_options={"include_usage": True})
        self._connection.request("POST", CHAT, json.dumps(body))
        self._answer = self._connection.getresponse()
        self.job = self._answer.getheader("X-Rbee-Job", "")
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.closing(self._connection):
            while data := self._answer.read1():
                self.body += data

    def ends_well(self) -> bool:
        self._thread.join(120)
        return self.body.count(b'"word ') == WORDS and self.body.endswith(b"data: [DONE]\n\n")


def refused(queen: RunningQueen) -> bool:
    """Ask for a job, which must be taken, or refused in words; return whether it was refused."""
    status, headers, told = call(queen, "POST", "/v1/jobs", {"endpoint": CHAT, "body": chat()})
    if status == 202:
        return False
    assert (status, told["error"]["code"]) == (503, "storage_unavailable"), told
    assert int(headers["retry-after"]) >= 1
    return True


def test_a_full_disk_refuses_new_jobs_and_ends_none(fleet: FleetFolder, server: RunningServer, tmp_path: Path) -> None:
    taken: list[str] = []
    with small_disk(tmp_path / "small") as home:
        with queen_at(home, fleet, server) as queen:
            for _ in range(3):
                taken.append(call(queen, "POST", "/v1/jobs", {"endpoint": CHAT, "body": chat()})[2]["job_id"])
            stream = Stream(queen)
            mend = fill(home)
            until(lambda: refused(queen), "a job to be refused")
            status, headers, told = call(queen, "POST", CHAT, chat())
            assert (status, told["error"]["code"]) == (503, "storage_unavailable")
            assert headers["retry-after"]
            # What needs no disk is there all the while.
            assert call(queen, "GET", "/v1/models")[0] == 200
            assert call(queen, "GET", "/health")[0] == 200
            assert stream.ends_well()
            mend()
            until(lambda: call(queen, "POST", CHAT, chat())[0] == 200, "requests to be taken again")
            until(lambda: not refused(queen), "jobs to be taken again")
            for job in taken:
                until(lambda job=job: call(queen, "GET", f"/v1/jobs/{job}")[2]["status"] in FINAL, "the jobs to end")  # type: ignore[misc]
            end(queen.process)
            assert queen.process.returncode == 0
            assert "Traceback" not in "\n".join(queen.log)
        usage = dict(rows(home, "SELECT job, completion_tokens FROM usage"))
        assert usage[stream.job] == WORDS
        assert {usage[job] for job in taken} == {3}
        assert rows(home, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("spoil", [fill, forbid])
def test_a_queen_that_starts_without_a_disk_for_her_records_serves_once_there_is_one(
    fleet: FleetFolder, server: RunningServer, tmp_path: Path, spoil: Callable[[Path], Callable[[], None]]
) -> None:
    with small_disk(tmp_path / "state" / "records") as disk:
        mend = spoil(disk)
        with queen_at(tmp_path, fleet, server) as queen:
            until(lambda: refused(queen), "jobs to be refused")
            assert call(queen, "POST", CHAT, chat())[0] == 503
            mend()
            until(lambda: call(queen, "POST", CHAT, chat())[0] == 200, "requests to be taken")
            until(lambda: not refused(queen), "jobs to be taken")
            end(queen.process)
            assert "Traceback" not in "\n".join(queen.log)


def test_a_database_that_somebody_locks_is_503_and_no_hang(
    fleet: FleetFolder, server: RunningServer, tmp_path: Path
) -> None:
    with queen_at(tmp_path, fleet, server) as queen:
        assert call(queen, "POST", CHAT, chat())[0] == 200
        stream = Stream(queen)
        other = sqlite3.connect(tmp_path / "state" / "records" / "records.sqlite", isolation_level=None)
        with contextlib.closing(other):
            other.execute("BEGIN IMMEDIATE")
            until(lambda: refused(queen), "a job to be refused")
            assert call(queen, "GET", "/v1/models")[0] == 200
            other.execute("ROLLBACK")
        until(lambda: not refused(queen), "jobs to be taken again")
        until(lambda: call(queen, "POST", CHAT, chat())[0] == 200, "requests to be taken again")
        assert stream.ends_well()
        end(queen.process)
        assert not [line for line in queen.log if "Traceback" in line]
    assert dict(rows(tmp_path, "SELECT job, completion_tokens FROM usage"))[stream.job] == WORDS
