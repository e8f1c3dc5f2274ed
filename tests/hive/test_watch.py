"""`GET /v1/hive/watch`: news of a hive as it happens, for a queen that dials."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from declared_rig import Fleet, report, reported
from fleet_certificates import make_authority
from hive_rig import RunningHive, StartHive, until

from rbee.client import Client
from rbee.errors import RbeeError
from rbee.hive.watch import MAX_WAITING, Changes
from rbee.wire.fleet import HiveReport, WorkerState


@pytest.fixture
def fleet(tmp_path: Path, environment: dict[str, str]) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path / "host", make_authority(tmp_path / "authority"), environment)
    yield fleet
    fleet.end()


def watch(hive: RunningHive, after: HiveReport | str | None = None) -> HiveReport:
    client = Client(hive.url, token=hive.token, tls=hive.tls, timeout_s=60)
    text = f"{after.epoch!r}:{after.sequence}" if isinstance(after, HiveReport) else after or ""
    try:
        return client.get(f"/v1/hive/watch?after={text}", HiveReport)
    finally:
        client.close()


class Waiting(threading.Thread):
    """One wait for news, from a thread of its own."""

    def __init__(self, hive: RunningHive, after: HiveReport) -> None:
        super().__init__(daemon=True)
        self.hive, self.after = hive, after
        self.news: HiveReport | RbeeError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.news = watch(self.hive, self.after)
        except RbeeError as problem:
            self.news = problem

    def result(self) -> HiveReport:
        self.join(60)
        assert isinstance(self.news, HiveReport), self.news
        return self.news


def settled(hive: RunningHive) -> HiveReport:
    """Return a report that lists the engines, after which nothing changes by itself."""
    until(lambda: report(hive).engines, "the engines to be listed")
    return report(hive)


def test_who_has_nothing_or_something_old_is_answered_at_once(hive: RunningHive) -> None:
    last = settled(hive)
    assert watch(hive).epoch == last.epoch
    assert watch(hive, f"{last.epoch - 100!r}:{last.sequence + 100}").epoch == last.epoch


def test_who_has_the_newest_waits_until_something_changes(hive: RunningHive) -> None:
    last = settled(hive)
    waiting = Waiting(hive, last)
    others = [report(hive) for _ in range(3)]
    assert others[-1].sequence > last.sequence
    waiting.join(1.0)
    assert waiting.is_alive()
    worker = hive.ready("trial")
    news = waiting.result()
    assert news.sequence > last.sequence
    assert [one.name for one in news.workers] == [worker.name]


def test_no_change_between_two_waits_is_lost(hive: RunningHive) -> None:
    last = settled(hive)
    seen: list[WorkerState] = []
    name = hive.spawn("trial").name
    while not seen or seen[-1] is not WorkerState.READY:
        last = watch(hive, last)
        seen += [one.state for one in last.workers if one.name == name]
    hive.stop(name)
    until(lambda: not watch(hive, last).workers, "the worker to leave the news")


def test_a_declared_workers_end_is_news(fleet: Fleet) -> None:
    process = fleet.run_worker(fleet.declare("tiny"))
    hive = fleet.hive()
    reported(hive, "tiny", WorkerState.READY)
    waiting = Waiting(hive, settled(hive))
    fleet.unit("tiny", LoadState="loaded", ActiveState="failed", Result="oom-kill", MainPID=0)
    process.kill()
    assert waiting.result().workers[0].state is WorkerState.FAILED


def test_the_end_of_the_hive_ends_the_wait(hive: RunningHive) -> None:
    waiting = Waiting(hive, settled(hive))
    waiting.join(0.3)
    assert hive.terminate() == 0
    waiting.join(60)
    assert waiting.news is not None


def test_many_wait_and_those_who_leave_make_room(start_hive: StartHive) -> None:
    hive = start_hive("--ephemeral")
    last = settled(hive)
    request = f"GET /v1/hive/watch?after={last.epoch!r}:{last.sequence} HTTP/1.1\r\nHost: x\r\n"
    whole = f"{request}Authorization: Bearer {hive.token}\r\n\r\n".encode()
    port = int(hive.url.rpartition(":")[2])
    waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(MAX_WAITING)]
    for one in waiting:
        one.sendall(whole)
    extra: list[socket.socket] = []

    def is_full() -> bool:
        extra.append(socket.create_connection(("127.0.0.1", port)))
        extra[-1].sendall(whole)
        extra[-1].settimeout(0.5)
        try:
            return b" 503 " in extra[-1].recv(200)
        except TimeoutError:
            return False

    until(is_full, "the limit to be reached")
    assert hive.client.get("/health", dict)["status"] == "ok"
    for one in waiting + extra:
        one.close()
    until(lambda: not is_full(), "room for another one")
    for one in extra:
        one.close()


@pytest.mark.parametrize("after", ["x", "1", "1:", ":1", "1:-1", "1:1:1", "nan:1", "9" * 400 + ":1"])
def test_what_names_no_report_is_refused(hive: RunningHive, after: str) -> None:
    with pytest.raises(RbeeError, match="names no report") as refusal:
        watch(hive, after)
    assert refusal.value.status == 400


def test_a_wait_ends_at_its_limit() -> None:
    changes = Changes()
    started = time.monotonic()
    changes.wait(1, 0.05, lambda: False)
    assert time.monotonic() - started >= 0.05
    changes.changed(1)
    changes.wait(1, 600.0, lambda: False)
    changes.wait(2, 600.0, lambda: True)
    changes.close()
    changes.wait(2, 600.0, lambda: False)


class Systemd:
    """Where the hive's notifications arrive."""

    def __init__(self, file: Path) -> None:
        self.said: list[str] = []
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(file))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while data := self.socket.recv(65536):
            self.said += data.decode().split("\n")

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def test_systemd_is_told_of_readiness_life_and_end(fleet: Fleet, tmp_path: Path) -> None:
    systemd = Systemd(tmp_path / "n.sock")
    fleet.run_worker(fleet.declare("tiny"))
    hive = fleet.hive(notify=str(tmp_path / "n.sock"), watchdog_s=0.4)
    until(lambda: "READY=1" in systemd.said, "READY=1")
    reported(hive, "tiny", WorkerState.READY)
    until(lambda: systemd.said.count("WATCHDOG=1") > 2, "proofs of life")
    os.kill(hive.pid, signal.SIGTERM)
    assert hive.process.wait(60) == 0
    until(lambda: "STOPPING=1" in systemd.said, "STOPPING=1")
    systemd.close()
