"""What processes tell each other of their jobs, and what each makes of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from rbee.errors import QueueFull
from rbee.queen.fleet import Fleet
from rbee.queen.hives import Worker
from rbee.queen.link import Link
from rbee.queen.owners import Owner
from rbee.queen.queueing import Queues
from rbee.queen.shared_view import Doing, Exclusion, SharedCapacity, SharedView
from rbee.wire.fleet import HiveReport, ModelReport, WorkerReport, WorkerState

SLOTS = 8


class Process:
    """One process, with a fleet of one worker, that hears others."""

    def __init__(self, folder: Path) -> None:
        self.fleet = Fleet(folder / "fleet.json", "")
        worker = WorkerReport(name="w", model="m", backend="echo", state=WorkerState.READY, slots=SLOTS)
        self.fleet.learn(
            HiveReport(
                hive="h", url="unix:/none", version="", epoch=1.0, sequence=1, models=[ModelReport(name="m")],
                workers=[worker],
            )
        )  # fmt: skip
        self.met: dict[str, str] = {}
        self.link = Link("redis://127.0.0.1:1/0", "", "a0", on_up=lambda exchange: None, on_down=lambda: None)
        self.link.up = True
        self.view = SharedView(Owner("a", 0), "a0", self.link, "", self.fleet, self.met.__setitem__)
        self.capacity = SharedCapacity(self.fleet)
        self.capacity.view = self.view
        self.queues = Queues(self.capacity.slots, limit=10)
        self.queues.elsewhere = self.view.waiting
        self.view.queues = self.queues

    @property
    def worker(self) -> Worker:
        found = self.fleet.worker("h/w")
        assert found is not None
        return found

    def hear(self, process: str, running: int, waiting: int, *, at: str = "h/w", url: str = "") -> None:
        """Hear of another process' jobs, which run at a worker."""
        workers = {at: running} if running else {}
        doing = Doing(process, process[:-1], int(process[-1]), url, workers, {"m": (running, waiting)})
        self.view.hear(msgspec.json.encode(doing))


@pytest.fixture
def process(tmp_path: Path) -> Process:
    return Process(tmp_path)


def test_jobs_of_others_are_in_flight_here_too(process: Process) -> None:
    process.worker.in_flight += 2
    process.hear("a1", 3, 0)
    process.hear("b0", 1, 0)
    assert process.worker.in_flight == 6
    process.worker.in_flight -= 1
    process.hear("a1", 0, 0)
    assert process.worker.in_flight == 2
    assert process.view.doing().workers == {"h/w": 1}
    process.view.forget()
    assert process.worker.in_flight == 1


def test_what_others_run_leaves_fewer_slots(process: Process) -> None:
    assert process.capacity.slots("m") == SLOTS
    process.hear("a1", 3, 0)
    assert process.capacity.slots("m") == SLOTS - 3
    for _ in range(SLOTS):
        process.queues.of("m").enter("normal", "key", 1, process.capacity.slots("m"))
    # Eight of here and eight of there want eight slots.
    process.hear("a1", 4, 4)
    assert process.capacity.slots("m") == SLOTS // 2


def test_those_who_wait_go_on_when_others_are_done(process: Process) -> None:
    process.hear("a1", SLOTS, 0)
    queue = process.queues.of("m")
    assert queue.enter("normal", "key", 1, process.capacity.slots("m")) is None
    ticket = queue.enter("normal", "key", 1, process.capacity.slots("m"))
    assert ticket is not None
    assert not ticket.granted.is_set()
    process.hear("a1", 0, 0)
    assert ticket.granted.is_set()


def test_the_bound_of_a_queue_is_of_all_together(process: Process) -> None:
    process.hear("a1", SLOTS, 9)
    queue = process.queues.of("m")
    for _ in range(2):
        queue.enter("normal", "key", 1, 1)
    with pytest.raises(QueueFull, match="10 jobs wait for this model"):
        queue.enter("normal", "key", 1, 1)


def test_a_queen_with_machines_of_her_own_takes_nothing_away(process: Process) -> None:
    process.hear("b0", 8, 30, at="other/w", url="http://b")
    assert process.capacity.slots("m") == SLOTS
    assert process.met == {"b": "http://b"}
    process.hear("b0", 4, 0)
    assert process.capacity.slots("m") == SLOTS - 4


def test_alone_each_takes_the_same_share(process: Process) -> None:
    for name in ("a1", "b0", "b1"):
        process.hear(name, 1, 0)
    process.link.up = False
    process.view.forget()
    assert process.capacity.slots("m") == SLOTS // 4


def test_a_worker_that_failed_elsewhere_is_left_out_here(process: Process) -> None:
    for _ in range(5):
        process.view.hear(msgspec.json.encode(Exclusion("b0", "h/w", "failed")))
    assert process.worker.ejection.ejected
    # What a process told itself, and what it does not know, changes nothing.
    process.view.hear(msgspec.json.encode(Exclusion("a0", "h/w", "back")))
    process.view.hear(msgspec.json.encode(Exclusion("b0", "h/unknown", "back")))
    assert process.worker.ejection.ejected
