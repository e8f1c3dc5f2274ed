"""`--ephemeral` leaves nothing, whatever dies and when."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_rig import HANG_GUARD_S, Person, processes_with, wait_until

import rbee

PREFIX = Path(tempfile.gettempdir()) / "rbee-ephemeral-"
STAGES = ("rbee.queen run", "rbee.hive run", "rbee.worker run")


class Run:
    """One `rbee infer --ephemeral`, and what belongs to it."""

    def __init__(self, person: Person, *words: str) -> None:
        self.process = person.start("infer", "--ephemeral", *words)
        self.mark = f"{PREFIX}{self.process.pid}-"

    def processes(self) -> dict[int, str]:
        return processes_with(f"RBEE_HOME={self.mark}")

    def folders(self) -> list[Path]:
        return list(PREFIX.parent.glob(f"{Path(self.mark).name}*"))

    def wait_for(self, stage: str) -> int:
        """Wait until a process of this kind runs, and return its number."""

        def found() -> int:
            return next((pid for pid, command in self.processes().items() if stage in command), 0)

        wait_until(lambda: found() or self.process.poll() is not None, f"{stage} runs")
        return found()

    def leaves_nothing(self) -> None:
        wait_until(lambda: not self.processes(), f"every process ends: {self.processes()}")
        wait_until(lambda: not self.folders(), "the folder is removed")


def serving(person: Person) -> set[int]:
    """Return the person's own queen and hive, without what they start for a moment."""
    return {
        pid for pid, command in person.processes().items() if "rbee.queen run" in command or "rbee.hive run" in command
    }


@pytest.fixture
def question() -> tuple[str, ...]:
    return ("-p", "How do I add a machine?")


@pytest.fixture(autouse=True)
def _shared_memory_is_as_before() -> Iterator[None]:
    before = set(os.listdir("/dev/shm"))
    yield
    # Queens of others may have a file there for a moment: gunicorn makes it, and removes its name at once.
    wait_until(
        lambda: not [name for name in set(os.listdir("/dev/shm")) - before if "rbee" in name or "gunicorn" in name],
        "shared memory is as before",
    )


def test_it_answers_and_leaves_nothing(person: Person, question: tuple[str, ...]) -> None:
    run = Run(person, *question)
    stdout, stderr = run.process.communicate(timeout=HANG_GUARD_S)
    assert run.process.returncode == 0, stderr
    assert len(stdout) > 10
    assert run.processes() == {}
    assert run.folders() == []
    assert not (person.home / "state" / "queen.json").exists()


def test_it_does_not_disturb_the_persons_own_queen(person: Person, question: tuple[str, ...]) -> None:
    person.rbee("queen", "start")
    before = serving(person)
    assert person.rbee("infer", "--ephemeral", *question).returncode == 0
    assert serving(person) == before


def test_it_knows_the_models_on_the_persons_own_list(person: Person) -> None:
    file = person.folder / "mine.gguf"
    shutil.copy(Path(rbee.__file__).parent / "models" / "rbee-demo.gguf", file)
    assert person.rbee("model", "add", "mine.gguf", "--name", "my-model").returncode == 0
    person.rbee("queen", "stop")
    done = person.rbee("infer", "--ephemeral", "-m", "my-model", "-p", "Hello")
    assert done.returncode == 0, done.stderr
    wrong = person.rbee("infer", "--ephemeral", "-m", "my-modle", "-p", "Hello")
    assert wrong.returncode == 4
    assert "Did you mean 'my-model'?" in wrong.stderr


def test_an_error_leaves_nothing(person: Person) -> None:
    run = Run(person, "-m", "no-such-model", "-p", "Hi")
    run.process.communicate(timeout=HANG_GUARD_S)
    assert run.process.returncode == 4
    assert (run.processes(), run.folders()) == ({}, [])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_stage_leaves_nothing(
    person: Person, question: tuple[str, ...], stage: str, number: signal.Signals
) -> None:
    run = Run(person, *question)
    run.wait_for(stage)
    run.process.send_signal(number)
    _, stderr = run.process.communicate(timeout=HANG_GUARD_S)
    assert b"Traceback" not in stderr, stderr
    assert (run.processes(), run.folders()) == ({}, [])


@pytest.mark.parametrize("stage", STAGES)
def test_rbee_killed_at_any_stage_leaves_nothing(person: Person, question: tuple[str, ...], stage: str) -> None:
    run = Run(person, *question)
    run.wait_for(stage)
    run.process.kill()
    run.process.communicate(timeout=HANG_GUARD_S)
    run.leaves_nothing()


@pytest.mark.parametrize("stage", STAGES)
def test_the_queen_killed_at_any_stage_leaves_nothing(person: Person, question: tuple[str, ...], stage: str) -> None:
    run = Run(person, *question)
    run.wait_for(stage)
    for pid, command in run.processes().items():
        if "rbee.queen run" in command:
            os.kill(pid, signal.SIGKILL)
    _, stderr = run.process.communicate(timeout=HANG_GUARD_S)
    assert b"Traceback" not in stderr, stderr
    assert (run.processes(), run.folders()) == ({}, [])


def test_what_rbee_and_queen_left_when_both_were_killed_is_swept_up(person: Person, question: tuple[str, ...]) -> None:
    run = Run(person, *question)
    queen = run.wait_for("rbee.queen run")
    wait_until(lambda: run.folders() or run.process.poll() is not None, "the folder is made")
    # The queen cannot clean up, because she is stopped before she is told.
    os.kill(queen, signal.SIGSTOP)
    run.process.kill()
    run.process.communicate(timeout=HANG_GUARD_S)
    for pid in run.processes():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not run.processes(), "all end")
    assert run.folders()
    assert person.rbee("infer", "--ephemeral", *question).returncode == 0
    assert run.folders() == []


def test_a_reader_that_stops_early_leaves_nothing(person: Person) -> None:
    run = Run(person, "-p", "What is rbee?")
    assert run.process.stdout is not None
    run.process.stdout.close()
    assert run.process.wait(HANG_GUARD_S) == 0
    assert run.process.stderr is not None
    run.process.stderr.close()
    assert (run.processes(), run.folders()) == ({}, [])


def test_it_cannot_be_had_of_another_queen(person: Person) -> None:
    done = person.rbee("--queen", "http://127.0.0.1:1", "infer", "--ephemeral", "-p", "Hi")
    assert done.returncode == 2
    assert "--ephemeral" in done.stderr


def test_it_works_beside_others(person: Person, question: tuple[str, ...]) -> None:
    runs = [Run(person, *question) for _ in range(2)]
    for run in runs:
        _, stderr = run.process.communicate(timeout=HANG_GUARD_S)
        assert run.process.returncode == 0, stderr
        assert (run.processes(), run.folders()) == ({}, [])
