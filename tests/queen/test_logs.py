"""The queen's log: one record a line whatever clients send, as text or JSON, and the job that it is about."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
import pytest
from job_calls import CHAT, call, slow_worker
from queen_rig import FleetFolder, settings_file, until_state

from rbee import logs
from rbee.logs import MAX_FIELD_CHARS, JsonFormatter, Lines, TextFormatter, clip
from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, running_queen, until

GREENLET = """
import gevent
from rbee import logs
from rbee.queen.log_sources import log_greenlets
logs.configure("json")
log_greenlets()
gevent.spawn(lambda: 1 / 0).join()
"""
FORGED = "2026-01-01 00:00:00,000 INFO rbee.queen: all keys were deleted"
EVIL = f"x\n{FORGED}\x1b[2J\u2028\x07"
CANARY = "the canary in the prompt"


def record(message: str, *args: object, **more: Any) -> logging.LogRecord:
    made = logging.LogRecord("rbee.queen", logging.WARNING, "file", 1, message, args, more.pop("exc_info", None))
    made.__dict__.update(more)
    return made


def failure(text: str) -> Any:
    try:
        raise ValueError(text)
    except ValueError as problem:
        return type(problem), problem, problem.__traceback__


def test_a_field_of_a_client_is_one_short_line() -> None:
    assert clip(EVIL).startswith(f"x\\n{FORGED}\\x1b[2J\\u2028\\x07")
    assert clip("é" * 10) == "é" * 10
    for text in ("A" * 1_000_000, "\n" * 1_000_000):
        assert len(clip(text)) == MAX_FIELD_CHARS
        assert clip(text).endswith("…")


def test_a_text_record_cannot_be_forged() -> None:
    [line] = TextFormatter().format(record("the model %r is %s (%d)", EVIL, ValueError(EVIL), 7)).splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING rbee.queen: the model ", line)
    assert "\x1b" not in line
    assert line.endswith("(7)")


def test_further_lines_of_a_text_record_are_indented() -> None:
    text = TextFormatter().format(record("it stands:\n%s", Lines("a\nb"), exc_info=failure(EVIL)))
    first, *others = text.splitlines()
    assert first.endswith("it stands:")
    assert others[:3] == ["    a", "    b", "    Traceback (most recent call last):"]
    assert all(line.startswith("    ") for line in others)
    assert f"    {FORGED}\\x1b[2J" in others
    assert TextFormatter().format(record("%s", "A" * 10_000_000)).endswith("…")


def test_a_json_record_is_one_object_in_one_line() -> None:
    text = JsonFormatter().format(record("%s", EVIL + "\ud800", exc_info=failure(EVIL), created=1.0625))
    told = json.loads(text)
    assert "\n" not in text
    assert "\x1b" not in text
    assert told["time"] == "1970-01-01T00:00:01.062Z"
    assert (told["level"], told["logger"], told["message"]) == ("WARNING", "rbee.queen", EVIL + "\\ud800")
    assert told["exception"].startswith("Traceback (most recent call last):\n")
    assert "job" not in told
    assert len(JsonFormatter().format(record("%s", "A" * 10_000_000))) < 20_000


def test_records_name_the_job_that_is_served_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_live", {"job_1", "job_2"})

    def serve(job: str) -> str:
        logs.serving(job)
        gevent.sleep(0)
        return TextFormatter().format(record("said"))

    several = [gevent.spawn(serve, job) for job in ("job_1", "job_2", "job_over")]
    gevent.joinall(several)
    assert [str(one.value).rpartition("said")[2] for one in several] == [" [job_1]", " [job_2]", ""]
    assert json.loads(JsonFormatter().format(record("x", job="job_3")))["job"] == "job_3"


def test_what_ends_a_greenlet_is_a_record() -> None:
    run = subprocess.run([sys.executable, "-c", GREENLET], capture_output=True, text=True, timeout=60, check=True)
    [line] = run.stderr.splitlines()
    told = json.loads(line)
    assert told["level"] == "ERROR"
    assert told["exception"].endswith("ZeroDivisionError: division by zero")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


@contextlib.contextmanager
def serving(server: RunningServer, folder: Path, **settings: Any) -> Iterator[RunningQueen]:
    fleet = FleetFolder(folder / "inventory")
    fleet.write(desk=["HivePort none", f"Worker says model=honey url={server.url}"])
    with running_queen("--settings", settings_file(folder, fleet, **settings)) as queen:
        until_state(queen, "desk", "ready")
        yield queen


def attack(queen: RunningQueen) -> None:
    """Send what would forge records, and what would fill the disk."""
    prompt = [{"role": "user", "content": CANARY}]
    for model, status in ((EVIL, 404), ("A" * 1_000_000, 400)):
        assert call(queen, "POST", CHAT, {"model": model, "messages": prompt})[0] == status
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", f"/v1/%0a{'B' * 2000}%1b", headers={"User-Agent": "C" * 8000})
        assert connection.getresponse().status in (400, 404, 414, 431)


def test_each_job_is_a_json_record_with_its_id(server: RunningServer, tmp_path: Path) -> None:
    with serving(server, tmp_path, log_format="json", log_jobs=True) as queen:
        attack(queen)
        asked = {"model": "honey", "messages": [{"role": "user", "content": CANARY}]}
        _, headers, _ = call(queen, "POST", CHAT, asked)
        server.behave(answer="drop")
        status, broken, _ = call(queen, "POST", CHAT, asked)
        server.behave(answer="ok")
        assert status == 502
        written = [line for line in queen.log if not line.startswith("listening on ")]
        until(lambda: sum('"outcome"' in line for line in queen.log) == 3, "the record of each job")
    written = [line for line in queen.log if not line.startswith("listening on ")]
    records = [json.loads(line) for line in written]
    jobs = {told["job"]: told for told in records if "outcome" in told}
    answered, failed = jobs[headers["x-rbee-job"]], jobs[broken["x-rbee-job"]]
    assert (answered["outcome"], answered["worker"], answered["prompt_tokens"]) == ("ok", "desk/says", 5)
    assert answered["duration_s"] >= answered["queue_s"] >= 0
    assert (failed["outcome"], failed["attempts"], failed["level"]) == ("worker_lost", 2, "INFO")
    assert {told["outcome"] for told in jobs.values()} == {"ok", "worker_lost", "model_not_found"}
    assert all(len(str(told["model"])) <= MAX_FIELD_CHARS for told in jobs.values())
    assert all(len(line) < 2000 for line in written)
    assert CANARY not in "".join(written)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told["time"]) for told in records)


def test_text_records_keep_to_their_lines_and_name_jobs(server: RunningServer, tmp_path: Path) -> None:
    with serving(server, tmp_path, log_jobs=True) as queen:
        attack(queen)
        until(lambda: any("model_not_found" in line for line in queen.log), "the record of each job")
    written = [line for line in queen.log if not line.startswith("listening on ")]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [a-z.]+: ", line) for line in written), written
    assert not any(line.startswith(FORGED) for line in written)
    assert all(len(line) < 1000 for line in written)
    assert all(re.search(r" \[job_[0-9a-f]+\]$", line) for line in written if "model_not_found" in line)
    assert CANARY not in "".join(written)


def test_the_hive_of_this_machine_logs_in_the_same_format() -> None:
    with running_queen("--log-format", "json") as queen:
        slow_worker(queen)
        until(lambda: any("is starting: echo" in line for line in queen.log), "the hive to say that it starts a worker")
    written = [line for line in queen.log if not line.startswith("listening on ")]
    assert {json.loads(line)["logger"] for line in written} >= {"rbee.hive"}


def test_jobs_are_not_logged_unless_it_is_wanted(server: RunningServer, tmp_path: Path) -> None:
    with serving(server, tmp_path) as queen:
        asked = {"model": "honey", "messages": [{"role": "user", "content": CANARY}]}
        assert call(queen, "POST", CHAT, asked)[0] == 200
    assert not any(CHAT in line for line in queen.log)
