"""The verbs that look at and change the fleet: workers, models, machines, engines, keys, and the doctor."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
from cli_rig import Person

import rbee

DEMO = Path(rbee.__file__).parent / "models" / "rbee-demo.gguf"


@pytest.mark.parametrize(
    "words",
    [["worker", "list"], ["hive", "list"], ["hive", "status"], ["worker", "stop", "x"], ["worker", "logs", "x"]],
)
def test_looking_starts_no_queen(person: Person, words: list[str]) -> None:
    done = person.rbee(*words)
    assert (done.returncode, done.stdout) == (3, "")
    assert "rbee queen start" in done.stderr
    assert not person.processes()


def test_a_worker_from_spawn_to_stop(person: Person) -> None:
    spawned = person.rbee("worker", "spawn", "-m", "rbee-demo", "--name", "demo", "--ctx", "512", "--slots", "2")
    assert (spawned.returncode, spawned.stdout) == (0, "demo\n"), spawned.stderr
    listed = json.loads(person.rbee("worker", "list", "--json").stdout)
    assert [(w["name"], w["model"], w["state"], w["slots"]) for w in listed] == [("demo", "rbee-demo", "ready", 2)]
    table = person.rbee("worker", "list").stdout.splitlines()
    assert table[0].split()[:3] == ["WORKER", "HIVE", "MODEL"]
    assert table[1].split()[0] == "demo"
    assert person.rbee("worker", "logs", "demo").returncode == 0
    assert "already" in person.rbee("worker", "spawn", "-m", "rbee-demo", "--name", "demo").stderr

    stopped = person.rbee("worker", "stop", f"{listed[0]['hive']}/demo")
    assert stopped.returncode == 0, stopped.stderr
    assert json.loads(person.rbee("worker", "list", "--json").stdout) == []
    again = person.rbee("worker", "stop", "demo")
    assert again.returncode == 4
    assert "rbee worker list" in again.stderr


def test_a_worker_that_cannot_load_says_why(person: Person) -> None:
    done = person.rbee("worker", "spawn", "-m", "echo", "--option", "fail=load")
    assert done.returncode == 1
    assert "fail=load says so" in done.stderr
    assert "rbee worker logs echo" in done.stderr
    assert "fail=load says so" in person.rbee("queen", "status").stdout


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["-m", "nothing"], 4),
        (["-m", "echo", "--backend", "xllamacpp"], 2),
        (["-m", "echo", "--backend", "no-such-engine"], 2),
        (["-m", "echo", "--backend", "cuda"], 2),
        (["-m", "echo", "--option", "no-equals-sign"], 2),
        (["-m", "echo", "--option", "no-such=1"], 2),
        (["-m", "echo", "--gpu", "0"], 2),
        (["-m", "echo", "--backend", "cuda", "--device", "metal"], 2),
        (["-m", "echo", "-a", "nowhere"], 4),
        (["-m", "../etc"], 2),
    ],
)
def test_a_worker_that_cannot_be(person: Person, words: list[str], code: int) -> None:
    done = person.rbee("worker", "spawn", *words)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("rbee: ")


def test_a_model_from_add_to_remove(person: Person) -> None:
    file = person.folder / "own model.gguf"
    shutil.copy(DEMO, file)
    added = person.rbee("model", "add", file.name, "--name", "mine")
    assert (added.returncode, added.stdout) == (0, "mine\n"), added.stderr
    listed = {model["name"]: model for model in json.loads(person.rbee("model", "list", "--json").stdout)}
    assert listed["mine"]["path"] == str(file)
    assert "mine" in person.rbee("model", "list").stdout
    assert str(file) in person.rbee("model", "show", "mine").stdout
    assert person.rbee("infer", "-q", "-m", "mine", "-p", "Hi").returncode == 0

    removed = person.rbee("model", "remove", "mine")
    assert removed.returncode == 0
    assert "untouched" in removed.stderr
    assert file.exists()
    assert person.rbee("model", "remove", "mine").returncode == 4
    assert person.rbee("model", "remove", "rbee-demo").returncode == 2


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "cut"])
def test_a_file_that_is_no_model_is_refused(person: Person, kind: str) -> None:
    file = person.folder / "file.gguf"
    if kind == "folder":
        file.mkdir()
    elif kind == "text":
        file.write_text("no model")
    elif kind == "cut":
        file.write_bytes(DEMO.read_bytes()[:100_000])
    done = person.rbee("model", "add", str(file))
    assert done.returncode == (4 if kind == "missing" else 2)
    assert str(file) in done.stderr


def test_the_machines(person: Person) -> None:
    person.rbee("queen", "start")
    (hive,) = json.loads(person.rbee("hive", "list", "--json").stdout)
    assert hive["devices"][0]["kind"] == "cpu"
    shown = person.rbee("hive", "status", hive["hive"]).stdout
    assert "xllamacpp" in shown
    assert "rbee-demo" in shown
    assert person.rbee("hive", "status", "nowhere").returncode == 4


def test_the_engines_need_no_queen(person: Person) -> None:
    engines = {engine["name"]: engine for engine in json.loads(person.rbee("plugin", "list", "--json").stdout)}
    assert "chat" in engines["echo"]["capabilities"]
    table = person.rbee("plugin", "list").stdout
    assert "says the last user message back" in table
    assert not person.processes()


def test_a_plugin_that_raises_in_import_is_a_line_of_the_list(person: Person) -> None:
    (person.folder / "broken.py").write_text("raise RuntimeError('broken on purpose')")
    (person.folder / "broken-1.0.dist-info").mkdir()
    (person.folder / "broken-1.0.dist-info" / "METADATA").write_text("Name: broken\nVersion: 1.0\n")
    (person.folder / "broken-1.0.dist-info" / "entry_points.txt").write_text(
        "[rbee.backends]\nbroken = broken:Broken\n"
    )
    done = person.rbee("plugin", "list", PYTHONPATH=str(person.folder))
    assert done.returncode == 0
    assert "broken on purpose" in done.stdout
    assert "echo" in done.stdout


def test_a_key_from_create_to_revoke(person: Person) -> None:
    made = person.rbee("key", "create", "laptop", "--expires", "1")
    secret = made.stdout.strip()
    assert secret.startswith("rbee_sk_")
    assert person.rbee("key", "create", "boss", "--admin", "-q").stderr == ""
    listed = person.rbee("key", "list")
    assert secret not in listed.stdout
    keys = {key["name"]: key for key in json.loads(person.rbee("key", "list", "--json").stdout)}
    assert keys["boss"]["scopes"] == ["admin", "inference"]
    assert keys["laptop"]["expires_at"] - keys["laptop"]["created_at"] == pytest.approx(86400, abs=60)
    assert stat.S_IMODE((person.home / "state" / "keys.sqlite").stat().st_mode) == 0o600

    url = person.rbee("queen", "start").stdout.strip()
    other = Person(person.home / "other", person.folder, {"RBEE_URL": url, "RBEE_API_KEY": secret})
    assert other.rbee("infer", "-q", "-m", "echo", "-p", "Hi").stdout == "Hi\n"
    assert other.rbee("worker", "list").returncode == 5
    assert person.rbee("key", "revoke", keys["laptop"]["id"]).returncode == 0
    refused = other.rbee("infer", "-q", "-m", "echo", "-p", "Hi")
    assert refused.returncode == 5
    assert secret not in refused.stderr
    assert person.rbee("key", "revoke", "unknown").returncode == 4
    assert other.rbee("key", "list").returncode == 2


def test_the_doctor_finds_what_is_wrong(person: Person) -> None:
    person.rbee("queen", "start")
    checks = json.loads(person.rbee("doctor", "--json").stdout)
    states = {check["name"]: check["state"] for check in checks}
    for name in ("python", "packages", "state folder", "queen", "hive", "queen's port", "script", "secrets", "memory"):
        assert states[name] == "ok", name

    (person.home / "config").mkdir()
    (person.home / "config" / "scheduler.rhai").write_text("fn route_task(task, workers) {")
    (person.home / "state" / "hive.token").chmod(0o644)
    sick = person.rbee("doctor")
    assert sick.returncode == 1
    failed = [line for line in sick.stdout.splitlines() if line.startswith("fail ")]
    assert any("script" in line and "scheduler.rhai" in line for line in failed)
    assert any("hive.token" in line for line in failed)
    assert "try: chmod 600" in sick.stdout


def test_the_doctor_starts_and_changes_nothing(person: Person) -> None:
    person.rbee("doctor")
    assert not person.processes()


def test_the_version(person: Person) -> None:
    versions = json.loads(person.rbee("version", "--json").stdout)
    assert versions["rbee"] == rbee.__version__
    assert versions["queen"] is None
    assert person.rbee("--version").stdout == f"rbee {rbee.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_a_shell(person: Person, shell: str) -> None:
    assert "_RBEE_COMPLETE" in person.rbee("completion", shell).stdout


def test_what_is_completed(person: Person) -> None:
    def complete(line: str) -> list[str]:
        words = line.split(" ")
        asked = {"_RBEE_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        return person.rbee(**asked).stdout.split()

    assert complete("rbee inf") == ["plain,infer"]
    assert complete("rbee queen sta") == ["plain,start", "plain,status"]
    assert complete("rbee infer -m rbee") == []
    person.rbee("queen", "start")
    assert complete("rbee infer -m rbee") == ["plain,rbee-demo"]


@pytest.mark.parametrize(
    ("words", "near"), [(["infr"], "infer"), (["worker", "spwn"], "spawn"), (["modle", "list"], "model")]
)
def test_a_misspelt_command_is_answered_with_the_right_one(person: Person, words: list[str], near: str) -> None:
    done = person.rbee(*words)
    assert done.returncode == 2
    assert f"Did you mean '{near}'" in done.stderr
    assert "--help" in done.stderr
