"""`rbee infer` with the real queen, hive, workers and engines."""

from __future__ import annotations

import json
import os
import signal

import pytest
from cli_rig import HANG_GUARD_S, Person, wait_until

QUESTION = "How do I add a machine?"


def test_the_first_call_starts_everything_and_the_next_finds_it(person: Person) -> None:
    cold = person.rbee("infer", "-p", QUESTION)
    assert cold.returncode == 0, cold.stderr
    assert len(cold.stdout) > 10
    assert "tokens/s" in cold.stderr
    pids = set(person.processes())

    warm = person.rbee("infer", "--json", "-p", QUESTION, "--temperature", "0")
    answer = json.loads(warm.stdout)
    assert answer["worker"].endswith("/rbee-demo")
    assert answer["job"].startswith("job_")
    assert answer["usage"]["completion_tokens"] > 0
    assert set(person.processes()) == pids


def test_standard_input(person: Person) -> None:
    done = person.rbee("infer", "-q", "-m", "echo", stdin="from a pipe\n")
    assert (done.returncode, done.stdout) == (0, "from a pipe\n")


def test_the_limits_reach_the_engine(person: Person) -> None:
    done = person.rbee("infer", "-m", "echo", "--max-tokens", "2", "-p", "one two three")
    assert done.stdout == "one two\n"
    assert "cut at --max-tokens" in done.stderr


def test_the_same_seed_says_the_same(person: Person) -> None:
    said = {person.rbee("infer", "-q", "--seed", "7", "--temperature", "0", "-p", QUESTION).stdout for _ in range(3)}
    assert len(said) == 1


def test_an_unknown_model_names_what_is_near_and_what_there_is(person: Person) -> None:
    done = person.rbee("infer", "-m", "rbee-dem", "-p", "Hi")
    assert (done.returncode, done.stdout) == (4, "")
    assert "rbee-demo" in done.stderr
    assert "rbee model add" in done.stderr


def test_an_unknown_machine(person: Person) -> None:
    done = person.rbee("infer", "-a", "nowhere", "-p", "Hi")
    assert done.returncode == 4
    assert "nowhere" in done.stderr


def test_a_machine_by_name(person: Person) -> None:
    person.rbee("queen", "start")
    hive = json.loads(person.rbee("hive", "list", "--json").stdout)[0]["hive"]
    done = person.rbee("infer", "--json", "-q", "-a", hive, "-m", "echo", "-p", "Hi")
    assert json.loads(done.stdout)["worker"].startswith(f"{hive}/")


def test_the_queen_of_another_address_needs_no_queen_here(person: Person) -> None:
    url = person.rbee("queen", "start").stdout.strip()
    other = Person(person.home / "other", person.folder)
    done = other.rbee("infer", "-q", "-m", "echo", "-p", "Hi", RBEE_URL=url)
    assert (done.returncode, done.stdout) == (0, "Hi\n"), done.stderr
    assert not (other.home / "state" / "queen.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_the_job_and_leaves_the_queen(person: Person, number: signal.Signals) -> None:
    person.rbee("worker", "spawn", "-m", "echo", "--option", "delay_ms=50")
    running = person.start("infer", "-m", "echo", "-p", "word " * 1000)
    assert running.stdout is not None
    assert os.read(running.stdout.fileno(), 4) == b"word"
    running.send_signal(number)
    _, stderr = running.communicate(timeout=HANG_GUARD_S)
    assert running.returncode == (130 if number == signal.SIGINT else 128 + number)
    assert b"Traceback" not in stderr

    def in_flight() -> int:
        flying: int = json.loads(person.rbee("queen", "status", "--json").stdout)["in_flight"]
        return flying

    wait_until(lambda: in_flight() == 0, "the job is cancelled")


def test_a_worker_that_is_killed_in_the_middle(person: Person) -> None:
    person.rbee("worker", "spawn", "-m", "echo", "--option", "delay_ms=50")
    running = person.start("infer", "-m", "echo", "-p", "word " * 1000)
    assert running.stdout is not None
    assert os.read(running.stdout.fileno(), 4) == b"word"
    worker = next(pid for pid, command in person.processes().items() if "rbee.worker run" in command)
    os.kill(worker, signal.SIGKILL)
    _, stderr = running.communicate(timeout=HANG_GUARD_S)
    assert running.returncode == 3
    assert stderr.startswith(b"rbee: ")


def test_a_queen_that_is_killed_in_the_middle(person: Person) -> None:
    person.rbee("worker", "spawn", "-m", "echo", "--option", "delay_ms=50")
    running = person.start("infer", "-m", "echo", "-p", "word " * 1000)
    assert running.stdout is not None
    assert os.read(running.stdout.fileno(), 4) == b"word"
    for pid, command in person.processes().items():
        if "rbee.queen run" in command:
            os.kill(pid, signal.SIGKILL)
    running.communicate(timeout=HANG_GUARD_S)
    assert running.returncode == 3
    wait_until(lambda: not person.processes(), "hive and worker end with the queen")
    assert person.rbee("infer", "-q", "-m", "echo", "-p", "Hi").stdout == "Hi\n"
