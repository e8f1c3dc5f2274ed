"""Reports to a queen who comes, goes and errs."""

from __future__ import annotations

import threading

import msgspec
import pytest
from hive_rig import FakeQueen, StartHive, until

from rbee.hive.report import Reporter
from rbee.http.server import Response, reply
from rbee.wire.fleet import HiveReport, WorkerReport, WorkerState


def reporter_for(queen: FakeQueen, heartbeat_s: float = 30.0) -> Reporter:
    """A reporter of a hive whose reports count up."""
    sequence = iter(range(1, 1_000_000))

    def build() -> HiveReport:
        return HiveReport(hive="h", url="http://127.0.0.1:1", version="0", epoch=1.0, sequence=next(sequence))

    def worker(name: str) -> WorkerReport:
        return WorkerReport(name=name, model="m", backend="b", state=WorkerState.READY)

    return Reporter(queen.url, "token", build, worker, heartbeat_s=heartbeat_s)


def test_changes_that_come_together_go_out_together(queen: FakeQueen) -> None:
    reporter = reporter_for(queen)
    reporter.start()
    until(lambda: queen.reports, "the first report")
    for _ in range(10_000):
        reporter.changed()
    last = len(queen.reports)
    until(lambda: len(queen.reports) > last, "a report of the changes")
    reporter.stop()
    assert len(queen.reports) < 1000
    assert [report.sequence for report in queen.reports] == sorted({report.sequence for report in queen.reports})


def test_a_change_during_a_report_is_reported_after_it(queen: FakeQueen) -> None:
    reporter = reporter_for(queen)
    inside, go_on = threading.Event(), threading.Event()

    def slow() -> Response:
        inside.set()
        go_on.wait(60)
        return reply({})

    queen.answer = slow
    reporter.start()
    assert inside.wait(60)
    reporter.changed()
    go_on.set()
    until(lambda: len(queen.reports) == 2, "the second report")
    reporter.stop()


def test_without_a_change_it_is_silent(queen: FakeQueen) -> None:
    reporter = reporter_for(queen)
    reporter.start()
    until(lambda: queen.reports, "the first report")
    reporter.changed()
    until(lambda: len(queen.reports) == 2, "the report of the change")
    threading.Event().wait(0.5)
    assert len(queen.reports) == 2
    reporter.stop()


def test_a_heartbeat_comes_without_a_change(queen: FakeQueen) -> None:
    reporter = reporter_for(queen, heartbeat_s=0.05)
    reporter.start()
    until(lambda: len(queen.reports) >= 4, "heartbeats")
    reporter.stop()


def test_a_queen_who_errs_is_told_again(queen: FakeQueen) -> None:
    reporter = reporter_for(queen)
    answers = [Response(b"<html>", 200), Response(b"no", 500), Response(b"{}", 401), reply({})]
    queen.answer = lambda: answers.pop(0) if len(answers) > 1 else answers[0]
    reporter.start()
    reporter.became_ready("w")
    until(lambda: len(queen.reports) >= 4, "the report to be sent again")
    assert {worker.name for worker in queen.ready} == {"w"}
    reporter.stop()


def test_news_of_a_ready_worker_is_kept_for_a_queen_who_is_away() -> None:
    first = FakeQueen()
    port = first.server.port
    reporter = reporter_for(first)
    first.close()
    reporter.start()
    reporter.became_ready("w")
    queen = FakeQueen(port)
    until(lambda: queen.ready and queen.reports, "the news")
    assert queen.ready[0].name == "w"
    reporter.stop()
    queen.close()


def test_a_queen_may_come_later_and_come_again(start_hive: StartHive) -> None:
    first = FakeQueen()
    port, url = first.server.port, first.url
    first.close()
    hive = start_hive("--ephemeral", "--queen", url, "--name", "here")
    hive.ready("trial")
    until(lambda: "the queen does not take reports" in hive.log(), "the hive to notice that she is away")
    queen = FakeQueen(port)
    until(lambda: queen.state_of("trial") is WorkerState.READY, "a report to the queen")
    assert {report.hive for report in queen.reports} == {"here"}
    queen.close()
    hive.ready("trial")
    queen = FakeQueen(port)
    until(lambda: queen.state_of("trial-2") is WorkerState.READY, "a report to the queen who came again")
    sequences = [report.sequence for report in queen.reports]
    assert sequences == sorted(set(sequences))
    assert {(report.url, report.pid) for report in queen.reports} == {(hive.url, hive.pid)}
    hive.terminate()
    queen.close()


def test_a_hive_that_starts_again_reports_a_higher_epoch(start_hive: StartHive, queen: FakeQueen) -> None:
    first = start_hive("--ephemeral", "--queen", queen.url)
    until(lambda: queen.reports)
    first.kill()
    start_hive("--ephemeral", "--queen", queen.url)
    until(lambda: len({report.epoch for report in queen.reports}) == 2, "a report of the second")
    epochs = [report.epoch for report in queen.reports]
    assert epochs == sorted(epochs)


def test_a_report_tells_what_the_machine_has(start_hive: StartHive, queen: FakeQueen) -> None:
    start_hive("--ephemeral", "--queen", queen.url)
    report = until(lambda: queen.reports and queen.reports[-1].engines and queen.reports[-1], "the engines")
    assert report.devices[0].kind == "cpu"
    assert {"echo", "trial", "trial-lame"} <= {engine.name for engine in report.engines}
    assert {"rbee-demo", "echo", "trial"} <= {model.name for model in report.models}


@pytest.mark.parametrize("name", ["", "a b", "../x", "-option", "x" * 300, "a/b"])
def test_a_report_of_a_hive_without_a_proper_name_is_none(name: str) -> None:
    body = {"hive": name, "url": "http://127.0.0.1:1", "version": "0", "epoch": 1.0, "sequence": 1}
    with pytest.raises(msgspec.ValidationError, match=r"\$\.hive"):
        msgspec.convert(body, HiveReport)
    assert msgspec.convert({**body, "hive": "Mac-Studio.local"}, HiveReport).hive == "Mac-Studio.local"
