"""The queen follows an inventory: its hosts, its mistakes, and the hives that come and go."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fleet_certificates import make_authority
from queen_rig import SECRET, FleetFolder, free_port, until_state, view

from rbee.errors import RbeeError
from rbee.testing.fakes import FakeServer
from rbee.testing.programs import RunningQueen, running_queen, until
from rbee.tokens import derived_token
from rbee.wire.fleet import QueenStatus, WorkerState
from rbee.wire.settings import HiveSettings, Tls, dump_settings

CHAT = "/v1/chat/completions"


def following(fleet: FleetFolder, *more: str, **options: Any) -> Any:
    return running_queen("--no-hive", "--inventory", str(fleet.folder), *more, **options)


def chat(model: str, text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


def answered(queen: RunningQueen, model: str) -> str:
    answer = queen.client.post(CHAT, chat(model), dict[str, Any])
    return str(answer["choices"][0]["message"]["content"])


def models(queen: RunningQueen) -> list[str]:
    return [model["id"] for model in queen.client.get("/v1/models", dict[str, Any])["data"]]


def loaded(queen: RunningQueen) -> list[str]:
    listed = queen.client.get("/v1/models", dict[str, Any])["data"]
    return [worker for model in listed for worker in model["rbee"]["loaded"]]


def metrics(queen: RunningQueen) -> list[str]:
    return queen.client.send("GET", "/metrics").read().decode().splitlines()


class Stream:
    """A streamed answer that is under way."""

    def __init__(self, queen: RunningQueen, model: str, words: int) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
        self._connection.request("POST", CHAT, json.dumps(chat(model, "word " * words, stream=True)))
        self._answer = self._connection.getresponse()
        self.text = self._answer.read1(1000)
        assert b"data: {" in self.text, self.text

    def more(self) -> None:
        """Wait for further words."""
        self.text += self._answer.read1(1000)

    def ends_well(self, words: int) -> bool:
        self.text += self._answer.read()
        self._connection.close()
        return self.text.count(b"word") == words and self.text.endswith(b"data: [DONE]\n\n")


@pytest.fixture
def queen(fleet: FleetFolder) -> Iterator[RunningQueen]:
    """Return a queen with an inventory that has no host yet."""
    with following(fleet) as running:
        yield running


def test_a_host_is_used_as_soon_as_it_is_written_down(fleet: FleetFolder, queen: RunningQueen) -> None:
    with fleet.hive("one") as one, fleet.hive("two", model="nectar") as two:
        fleet.write(one=one.port)
        assert until_state(queen, "one", "ready").url == f"https://127.0.0.1:{one.port}"
        assert answered(queen, "honey") == "one two three"
        fleet.write(one=one.port, two=two.port)
        until_state(queen, "two", "ready")
        assert models(queen) == ["honey", "nectar"]
        assert answered(queen, "nectar") == "one two three"


def test_a_stream_outlives_edits_and_the_end_of_its_host(fleet: FleetFolder, queen: RunningQueen) -> None:
    with fleet.hive("one", word_s=0.05) as one:
        fleet.write(one=one.port)
        until_state(queen, "one", "ready")
        stream = Stream(queen, "honey", 200)
        fleet.write(one=one.port, other=["HostName 127.0.0.1", "HivePort 1"])
        until_state(queen, "other", "unreachable")
        fleet.file.write_text("Host one\n    HivePort no number\n")
        until(lambda: queen.status().problems, "the mistake to be seen")
        stream.more()
        fleet.write(other=["HostName 127.0.0.1", "HivePort 1"])
        until(lambda: view(queen, "one") is None, "the host to be forgotten")
        assert models(queen) == []
        assert stream.ends_well(200)


def mistakes(queen: RunningQueen, fleet: FleetFolder) -> list[str]:
    """Return the lines of the inventory that the queen complains of; that a busy hive is late is another thing."""
    return [problem.where for problem in queen.status().problems if problem.where.startswith(str(fleet.file))]


def test_mistakes_are_shown_and_leave_the_last_good_inventory(fleet: FleetFolder, queen: RunningQueen) -> None:
    with fleet.hive("one") as one:
        fleet.write(one=one.port)
        until_state(queen, "one", "ready")
        good = fleet.file.read_text()
        fleet.file.write_text(good + "\nHost two\n    HivePort no number\n    Worker\n")
        lines = good.count("\n")
        seen = [f"{fleet.file}:{lines + 3}", f"{fleet.file}:{lines + 4}"]
        until(lambda: mistakes(queen, fleet) == seen, "the mistakes to be seen")
        assert "rbee_inventory_valid 0.0" in metrics(queen)
        assert answered(queen, "honey") == "one two three"
        fleet.file.write_text(good)
        until(lambda: not mistakes(queen, fleet), "the mistakes to be gone")
        assert "rbee_inventory_valid 1.0" in metrics(queen)


def test_the_last_good_inventory_outlives_the_queen(fleet: FleetFolder, tmp_path: Path) -> None:
    (home := tmp_path / "home").mkdir()
    with fleet.hive("one") as one:
        fleet.write(one=one.port)
        with following(fleet, home=home) as queen:
            until_state(queen, "one", "ready")
        fleet.file.write_text("Host one\n    HivePort no number\n")
        with following(fleet, home=home) as queen:
            until_state(queen, "one", "ready")
            assert answered(queen, "honey") == "one two three"
            assert mistakes(queen, fleet) == [f"{fleet.file}:2"]


def test_a_hive_that_dies_is_shown_and_comes_back(fleet: FleetFolder, queen: RunningQueen) -> None:
    with fleet.hive("one") as one:
        fleet.write(one=one.port)
        until_state(queen, "one", "ready")
        one.process.kill()
        away = until_state(queen, "one", "unreachable")
        assert f"127.0.0.1:{one.port}" in away.reason
        assert away.since > 0
        assert [problem.where for problem in queen.status().problems] == ["one"]
        until(lambda: models(queen) == [], "its models to leave the list")
        with pytest.raises(RbeeError, match="one: ") as refused:
            answered(queen, "honey")
        assert refused.value.status == 503
    with fleet.hive("one", port=one.port):
        until_state(queen, "one", "ready")
        assert answered(queen, "honey") == "one two three"
        until(lambda: not queen.status().problems, "nothing to be wrong any more")


def test_a_worker_that_broke_a_connection_is_taken_back_once_it_answers(
    fleet: FleetFolder, queen: RunningQueen
) -> None:
    with fleet.hive("one") as one:
        fleet.write(one=one.port)
        until_state(queen, "one", "ready")
        one.process.kill()
        with pytest.raises(RbeeError) as refused:
            answered(queen, "honey")
        assert refused.value.status in (502, 503)
    with fleet.hive("one", port=one.port):
        until_state(queen, "one", "ready")
        until(lambda: loaded(queen) == ["one/says"], "the worker to be taken back")
        assert answered(queen, "honey") == "one two three"


def test_a_hive_that_falls_silent_leaves_routing_but_its_streams_go_on(fleet: FleetFolder, queen: RunningQueen) -> None:
    with fleet.hive("one") as one, fleet.hive("worker", word_s=0.1) as worker:
        fleet.write(one=one.port, worker=worker.port)
        until_state(queen, "worker", "ready")
        theirs = worker.client.get("/v1/hive", dict[str, Any])["workers"][0]
        one.change(workers=[{**theirs, "model": "honey"}])
        worker.change(workers=[])
        until(lambda: view(queen, "one").workers[0].port == worker.port, "the change to be seen")  # type: ignore[union-attr]
        until(lambda: not view(queen, "worker").workers, "the change to be seen")  # type: ignore[union-attr]
        stream = Stream(queen, "honey", 150)
        fleet.write(one=one.port)
        os.kill(one.process.pid, signal.SIGSTOP)
        away = until_state(queen, "one", "unreachable")
        assert "did not answer within" in away.reason
        until(lambda: models(queen) == [], "its models to leave the list")
        os.kill(one.process.pid, signal.SIGCONT)
        until_state(queen, "one", "ready")
        assert models(queen) == ["honey"]
        assert stream.ends_well(150)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("authority", "its certificate is refused"),
        ("address", "its certificate is refused"),
        ("token", "token"),
        ("plain", "does not speak TLS"),
    ],
)
def test_a_hive_that_is_not_the_one_meant_gets_no_job(
    fleet: FleetFolder, queen: RunningQueen, tmp_path: Path, wrong: str, reason: str
) -> None:
    stranger = make_authority(tmp_path / "stranger")
    wrongs: dict[str, dict[str, Any]] = {
        "authority": {"credentials": stranger.host(tmp_path / "theirs")},
        "address": {"credentials": fleet.credentials("one", "192.0.2.1")},
        "token": {"token": "the token of another hive"},
    }
    with fleet.hive("one", **wrongs.get(wrong, {})) as one, FakeServer() as plain:
        fleet.write(one=one.port if wrong != "plain" else urlsplit(plain.url).port or 0)
        away = until_state(queen, "one", "unreachable")
        assert reason in away.reason
        assert models(queen) == []
        assert plain.calls == []


def test_a_hive_of_another_name_is_refused(fleet: FleetFolder, queen: RunningQueen) -> None:
    with fleet.hive("one") as one:
        fleet.write(one=one.port)
        until_state(queen, "one", "ready")
        one.change(hive="two")
        away = until_state(queen, "one", "unreachable")
        assert "'two'" in away.reason
        assert f"{fleet.file}:" in away.reason


def test_another_address_is_another_connection(fleet: FleetFolder, queen: RunningQueen) -> None:
    with fleet.hive("one") as one:
        fleet.write(one=one.port)
        until_state(queen, "one", "ready")
        fleet.write(one=["HostName 127.0.0.2", f"HivePort {one.port}"])
        url = f"https://127.0.0.2:{one.port}"
        until(lambda: (found := view(queen, "one")) and (found.url, found.state) == (url, "ready"), "the new address")
        assert answered(queen, "honey") == "one two three"


def test_a_script_knows_region_and_tags(fleet: FleetFolder, queen: RunningQueen) -> None:
    with fleet.hive("one") as one, fleet.hive("two") as two:
        where = "HostName 127.0.0.1"
        fleet.write(
            one=[where, f"HivePort {one.port}", "Region eu", "Tags big"],
            two=[where, f"HivePort {two.port}", "Region us", "Tags small quiet"],
        )
        (fleet.folder / "scheduler.rhai").write_text(
            'fn route_task(task, workers) { workers.in_region("us").filter(|w| "quiet" in w.tags).first() }'
        )
        until_state(queen, "one", "ready")
        assert until_state(queen, "two", "ready").tags == ["small", "quiet"]
        until(lambda: queen.status().scheduler != "built-in default", "the script to be in force")
        answer = queen.client.send("POST", CHAT, chat("honey"))
        answer.read()
        assert queen.status().scheduler_error == ""
        assert answer.headers["x-rbee-worker"].startswith("two/")


def test_without_the_fleets_key_it_says_what_is_missing(fleet: FleetFolder, queen: RunningQueen) -> None:
    key = fleet.folder / ".rbee" / "fleet.key"
    secret = key.read_text()
    key.unlink()
    with fleet.hive("one") as one:
        fleet.write(one=one.port)
        away = until_state(queen, "one", "unreachable")
        assert str(key) in away.reason
        key.write_text(secret)
        until_state(queen, "one", "ready")


def test_the_persons_own_inventory_is_followed_beside_this_machines_hive(fleet: FleetFolder, tmp_path: Path) -> None:
    (home := tmp_path / "home").mkdir()
    with running_queen(home=home) as queen, fleet.hive("one") as one:
        assert len(queen.status().hives) == 1
        fleet.write(one=one.port)
        config = home / "config"
        fleet.folder.rename(config)
        until_state(queen, "one", "ready")
        status: QueenStatus = queen.status()
        assert [hive.state for hive in status.hives] == ["ready", "ready"]
        assert answered(queen, "honey") == "one two three"
        assert answered(queen, "echo") == "one two three"
        (config / "hives.conf").unlink()
        until(lambda: len(queen.status().hives) == 1, "the host to be forgotten")
        assert answered(queen, "echo") == "one two three"


def test_a_real_hive_starts_a_worker_for_a_job(fleet: FleetFolder, queen: RunningQueen, tmp_path: Path) -> None:
    credentials = fleet.credentials("one")
    (credentials / "token").write_text(derived_token(SECRET, "hive", "one"))
    files = {name: str(credentials / name) for name in ("host.crt", "host.key", "ca.crt", "token")}
    settings = HiveSettings(
        name="one",
        host="127.0.0.1",
        port=free_port(),
        token_file=files["token"],
        tls=Tls(certificate=files["host.crt"], key=files["host.key"], authority=files["ca.crt"]),
        workers=str(tmp_path / "workers"),
        authority=files["ca.crt"],
    )
    (tmp_path / "hive.yaml").write_text(dump_settings(settings))
    command = [sys.executable, "-m", "rbee.hive", "run", "--settings", str(tmp_path / "hive.yaml")]
    home = Path(tempfile.mkdtemp(prefix="rbee-hive-"))  # short, for the sockets of its engines (unix(7))
    process = subprocess.Popen(command, env={**os.environ, "RBEE_HOME": str(home)}, stdout=subprocess.DEVNULL)
    try:
        fleet.write(one=settings.port)
        until(lambda: "echo" in models(queen), "the hive to list its models")
        assert answered(queen, "echo") == "one two three"
        [worker] = until_state(queen, "one", "ready").workers
        assert worker.state is WorkerState.READY
        assert Stream(queen, "echo", 100).ends_well(100)
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(home)
