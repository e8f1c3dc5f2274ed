"""`rbee scheduler`: scripts are checked, tried and shared before they decide anything."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
from cli_rig import Person

from rbee.testing.fakes import FakeServer

SCRIPTS = sorted((Path(__file__).parent.parent / "data" / "scripts").glob("*.rhai"))
TO_FIRST = "fn route_task(task, workers) {\n    return workers.first();\n}\n"
TO_LAST = TO_FIRST.replace("first", "last")
PLACES = {"at": 1e12, "places": 1, "workers": [{"id": "a/w", "in_flight": 0}, {"id": "b/w", "in_flight": 1}]}


def decision(number: int, chosen: str) -> dict[str, object]:
    return {
        "at": 1e12 + number,
        "places": 1,
        "task": {"model": "m", "priority": "batch"},
        "chosen": [chosen],
        "by": "x",
    }


def fingerprint(text: str) -> str:
    found = re.search(r"SHA256:[\w+/]+", text)
    assert found, text
    return found[0]


def signed(person: Person, text: str = TO_FIRST, *options: str, name: str = "mine") -> tuple[Path, str]:
    """Publish a script and return its file and the fingerprint of the key."""
    (person.folder / "draft.rhai").write_text(text)
    done = person.rbee("scheduler", "publish", "draft.rhai", "--name", name, "--version", "1.0", *options)
    assert done.returncode == 0, done.stderr
    return person.folder / f"{name}.rhai", fingerprint(done.stdout)


def installed(person: Person) -> str:
    return (person.home / "config" / "scheduler.rhai").read_text()


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda path: path.stem)
def test_published_scripts_are_sound(person: Person, file: Path) -> None:
    done = person.rbee("scheduler", "check", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert "is sound" in done.stdout


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("fn route_task(task, workers) {\n    workers[\n}", "s.rhai:3:"),
        ("fn other() { 1 }", "no function named route_task"),
        ("fn route_task(task, workers) {\n    if workers.len == 2 { workers[0].colour }\n}", "'colour'"),
        ('fn should_admit(task, depth) { if depth > 9 { "no" } else { true } }', "should_admit returned the text 'no'"),
        ("fn route_task(task, workers) { loop {} }", "route_task failed"),
    ],
)
def test_check_finds_what_is_wrong_also_when_only_a_run_shows_it(person: Person, text: str, complaint: str) -> None:
    (person.folder / "s.rhai").write_text(text)
    done = person.rbee("scheduler", "check", "s.rhai")
    assert done.returncode == 2
    assert complaint in done.stderr


def test_simulated_jobs_hold_their_slots(person: Person) -> None:
    (person.folder / "s.rhai").write_text("fn route_task(task, workers) { workers.least_loaded() }")
    jobs = [{"model": "m", "at_s": n, "duration_s": 10} for n in range(4)] + [{"model": "m", "at_s": 100}]
    (person.folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    workers = [{"id": "a/w", "slots": 1}, {"id": "b/w", "slots": 1}]
    (person.folder / "fleet.json").write_text(json.dumps({"workers": workers}))
    words = ("scheduler", "simulate", "s.rhai", "--jobs", "jobs.jsonl", "--workers", "fleet.json")
    told = json.loads(person.rbee(*words, "--json").stdout)
    assert (told["jobs"], told["chosen"], told["busiest"]) == (5, {"a/w": 3, "b/w": 2}, {"a/w": 2, "b/w": 2})
    assert "60%" in person.rbee(*words).stdout


def test_a_wrong_line_of_jobs_is_named(person: Person) -> None:
    (person.folder / "s.rhai").write_text(TO_FIRST)
    (person.folder / "jobs.jsonl").write_text('{"model": "m"}\n{"modell": "m"}\n')
    done = person.rbee("scheduler", "simulate", "s.rhai", "--jobs", "jobs.jsonl", "--workers", "jobs.jsonl")
    assert done.returncode == 2
    assert "jobs.jsonl:2:" in done.stderr


def test_replay_puts_decisions_side_by_side(person: Person) -> None:
    (person.folder / "s.rhai").write_text(TO_LAST)
    lines = [PLACES, decision(1, "a/w"), decision(2, "b/w"), {"at": 1e12, "places": 9, "task": {}, "chosen": []}]
    log = person.folder / "decisions.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"at": 1e12, "pla')
    told = json.loads(person.rbee("scheduler", "replay", "s.rhai", "--decisions", str(log), "--json").stdout)
    assert (told["jobs"], told["moved"], told["then"], told["now"]) == (2, 1, {"a/w": 1, "b/w": 1}, {"b/w": 2})
    shown = person.rbee("scheduler", "replay", "s.rhai", "--decisions", str(log)).stdout
    assert "1 of 2 jobs would go elsewhere" in shown
    assert "m  batch: a/w → b/w" in shown
    empty = person.rbee("scheduler", "replay", "s.rhai", "--decisions", os.devnull)
    assert (empty.returncode, "No decision" in empty.stderr) == (4, True)
    assert person.rbee("scheduler", "replay", "s.rhai", "--since", "soon").returncode == 2


def test_a_signed_script_is_installed_once_its_key_is_trusted(person: Person) -> None:
    file, key = signed(person)
    asked = person.rbee("scheduler", "install", f"./{file.name}")
    assert asked.returncode == 5
    assert key in asked.stderr
    assert not (person.home / "config" / "scheduler.rhai").exists()
    assert person.rbee("scheduler", "install", f"./{file.name}", "--trust", key).returncode == 0
    assert installed(person) == file.read_text()
    newer, _ = signed(person, TO_LAST)
    assert person.rbee("scheduler", "install", f"./{newer.name}").returncode == 0
    assert installed(person) == newer.read_text()
    assert "workers.first()" in (person.home / "config" / "scheduler.rhai.bak").read_text()


def test_a_person_is_asked_about_a_key_once(person: Person) -> None:
    file, key = signed(person)
    controller, terminal = pty.openpty()
    try:
        os.write(controller, b"y\n")
        done = subprocess.run(
            person.command("scheduler", "install", f"./{file.name}"), stdin=terminal, capture_output=True, text=True,
            cwd=person.folder, env=person.env(), timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(controller)
        os.close(terminal)
    assert done.returncode == 0, done.stderr
    assert key in done.stderr
    assert person.rbee("scheduler", "install", f"./{file.name}").returncode == 0


def test_a_changed_key_is_refused_even_when_it_is_trusted_for_another_script(person: Person) -> None:
    file, key = signed(person)
    assert person.rbee("scheduler", "install", f"./{file.name}", "--trust", key).returncode == 0
    before = installed(person)
    other, other_key = signed(person, TO_LAST, "--key", "other.key")
    assert other_key != key
    done = person.rbee("scheduler", "install", f"./{other.name}", "--trust", other_key)
    assert done.returncode == 5
    assert key in done.stderr
    assert other_key in done.stderr
    (person.folder / "mine.rhai").write_text(f"// rbee-script: name=mine, version=2.0\n{TO_LAST}")
    assert person.rbee("scheduler", "install", "./mine.rhai", "--unsigned").returncode == 5
    assert installed(person) == before


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text.replace("first()", "last()"), "changed after it was signed"),
        (lambda text: text.replace("version=1.0", "version=9.0"), "changed after it was signed"),
        (lambda text: text + "fn more() { 1 }\n", "is not signed"),
        (lambda text: re.sub(r"ed25519 \S+ \S+", "ed25519 AAAA !!!", text), "cannot be read"),
        (lambda text: text.partition("\n")[2], "no manifest"),
        (lambda text: text.replace("name=mine", "name=../mine"), "the manifest is wrong"),
    ],
)
def test_a_damaged_script_is_refused(person: Person, change: object, complaint: str) -> None:
    file, key = signed(person)
    assert callable(change)
    file.write_text(change(file.read_text()))
    done = person.rbee("scheduler", "install", f"./{file.name}", "--trust", key)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert not (person.home / "config" / "scheduler.rhai").exists()


def test_a_script_that_needs_another_rbee_is_refused(person: Person) -> None:
    file, key = signed(person, TO_FIRST, "--requires", "rbee>=99")
    done = person.rbee("scheduler", "install", f"./{file.name}", "--trust", key)
    assert (done.returncode, "needs rbee>=99" in done.stderr) == (2, True)


@pytest.mark.parametrize("name", ["prefer-cached", "cheapest-first", "batch-aside"])
def test_scripts_that_come_with_rbee_are_installed_by_name(person: Person, name: str) -> None:
    done = person.rbee("scheduler", "install", name)
    assert done.returncode == 0, done.stderr
    path = person.home / "config" / "scheduler.rhai"
    assert person.rbee("scheduler", "check", str(path)).returncode == 0


def test_a_name_is_looked_up_in_a_folder_of_ones_own(person: Person) -> None:
    shelf = person.folder / "shelf"
    shelf.mkdir()
    _, key = signed(person, TO_FIRST, "--to", "shelf")
    done = person.rbee("scheduler", "install", "mine", "--trust", key, RBEE_SCRIPTS=str(shelf))
    assert done.returncode == 0, done.stderr
    missing = person.rbee("scheduler", "install", "absent", RBEE_SCRIPTS=str(shelf))
    assert (missing.returncode, "prefer-cached" in missing.stderr) == (4, True)


def test_a_script_is_fetched_over_https_only(person: Person) -> None:
    done = person.rbee("scheduler", "install", "http://example.org/x.rhai")
    assert (done.returncode, "no https address" in done.stderr) == (2, True)
    assert person.rbee("scheduler", "install", "file:///etc/passwd").returncode == 2
    server = FakeServer()
    try:
        assert person.rbee("scheduler", "install", f"{server.url}/absent.rhai").returncode == 4
    finally:
        server.close()


def test_show_and_explain_say_that_no_queen_runs(person: Person) -> None:
    for words in (["show"], ["reload"], ["explain", "--model", "m"]):
        done = person.rbee("scheduler", *words)
        assert (done.returncode, "No queen is running" in done.stderr) == (3, True)


def test_a_running_queen_explains_shows_and_replays(person: Person) -> None:
    assert person.rbee("queen", "start").returncode == 0
    told = person.rbee("scheduler", "explain", "--model", "rbee-demo")
    assert told.returncode == 0, told.stderr
    assert "Decided by:  built-in default, line" in told.stdout
    assert "return workers.first();" in told.stdout
    assert person.rbee("scheduler", "explain", "-m", "absent").returncode == 4
    assert person.rbee("infer", "-p", "How do I add a machine?", "--max-tokens", "4").returncode == 0
    (person.home / "config").mkdir(exist_ok=True)
    (person.home / "config" / "scheduler.rhai").write_text(TO_LAST)
    assert person.rbee("scheduler", "reload").returncode == 0
    shown = person.rbee("scheduler", "show")
    assert shown.stdout == TO_LAST
    assert "scheduler.rhai" in shown.stderr
    (person.folder / "s.rhai").write_text(TO_FIRST)
    replayed = json.loads(person.rbee("scheduler", "replay", "s.rhai", "--since", "1h", "--json").stdout)
    assert replayed["jobs"] == 1
    (person.folder / "jobs.jsonl").write_text('{"model": "rbee-demo"}\n' * 3)
    simulated = json.loads(person.rbee("scheduler", "simulate", "s.rhai", "--jobs", "jobs.jsonl", "--json").stdout)
    assert simulated["jobs"] == sum(simulated["chosen"].values()) == 3
    record = json.loads((person.home / "state" / "queen.json").read_text())
    there = {"RBEE_URL": f"http://127.0.0.1:{record['port']}", "RBEE_API_KEY": record["token"]}
    assert person.rbee("scheduler", "install", "cheapest-first", **there).returncode == 0
    assert "name=cheapest-first" in person.rbee("scheduler", "show").stdout
    (person.home / "config" / "scheduler.rhai").write_text("fn route_task(")
    broken = person.rbee("scheduler", "reload")
    assert (broken.returncode, "does not compile" in broken.stderr) == (2, True)
