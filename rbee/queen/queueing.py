"""The queue of each model: bounded, by priority, and fair between keys within a priority.

A job goes at once while the model's ready workers have a free slot, and waits here otherwise: here it can be
overtaken by a more urgent one, and is never run when its client leaves. Within a priority, the next job is the one
with the smallest start tag of start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996), with a job's tokens as its
length: a key that sends much waits for its own jobs, not others for them. A less urgent priority waits for the more
urgent ones, but no longer than `starvation_s` for its next job.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gevent.event import Event

from rbee.errors import QueueFull
from rbee.queen.policy import PRIORITIES, Priority

UNBOUNDED = 1 << 30
STARVATION_S = 30.0
LONGEST_RETRY_S = 60.0
KEPT_QUEUES = 64


@dataclass(slots=True)
class Ticket:
    """A job's place in a queue; `granted` is set when it may run, or, with `left`, when it has lost its place."""

    key: str
    tokens: int
    enqueued_at: float
    granted: Event = field(default_factory=Event)
    left: bool = False


class Lane:
    """The waiting jobs of one priority, in the order of their start tags."""

    def __init__(self) -> None:
        self.served_at = 0.0
        self._heap: list[tuple[float, int, Ticket]] = []
        self._order = itertools.count()
        self._finish: dict[str, float] = {}
        self._virtual = 0.0
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def push(self, ticket: Ticket) -> None:
        """Add a job. One that comes after its key's earlier ones starts, virtually, when those have finished."""
        if not self._waiting:
            self._clear(ticket.enqueued_at)
        start = self.start_of(ticket.key)
        self._finish[ticket.key] = start + max(1, ticket.tokens)
        heapq.heappush(self._heap, (start, next(self._order), ticket))
        self._waiting += 1

    def pop(self, now: float) -> Ticket:
        """Return the next job. The lane must not be empty."""
        while True:
            start, _, ticket = heapq.heappop(self._heap)
            if not ticket.left:
                self._virtual = max(self._virtual, start)
                self._waiting -= 1
                self.served_at = now
                return ticket

    def start_of(self, key: str) -> float:
        """Return the start tag that a key's next job gets."""
        return max(self._virtual, self._finish.get(key, 0.0))

    def last_start(self) -> float:
        """Return the start tag of the job that is served last. The lane must not be empty."""
        return self._last()[0]

    def displace_last(self) -> None:
        """Take out the job that would be served last, and wake it. The lane must not be empty."""
        start, _, ticket = self._last()
        self._finish[ticket.key] = start  # it is the last of its key too, which owes nothing for it
        self.leave(ticket)
        ticket.granted.set()

    def _last(self) -> tuple[float, int, Ticket]:
        return max(entry for entry in self._heap if not entry[2].left)

    def leave(self, ticket: Ticket) -> None:
        """Take a waiting job out."""
        ticket.left = True
        self._waiting -= 1
        if 2 * self._waiting < len(self._heap) - 16:
            self._heap = [entry for entry in self._heap if not entry[2].left]
            heapq.heapify(self._heap)

    def waited_s(self, now: float) -> float:
        """Return how long the one who waits longest has waited."""
        return max((now - ticket.enqueued_at for _, _, ticket in self._heap if not ticket.left), default=0.0)

    def _clear(self, now: float) -> None:
        self._heap.clear()
        self._finish.clear()
        self._virtual, self.served_at = 0.0, now


class ModelQueue:
    """The jobs of one model: those that run, and those that wait."""

    def __init__(
        self,
        limit: int,
        starvation_s: float,
        clock: Callable[[], float],
        elsewhere: Callable[[], int] = lambda: 0,
    ) -> None:
        self._elsewhere = elsewhere
        self.running = 0
        self.job_s = 1.0
        self._limit = limit
        self._starvation_s = starvation_s
        self._clock = clock
        self.waiting = 0
        """How many jobs wait."""
        self._lanes = {priority: Lane() for priority in PRIORITIES}

    @property
    def idle(self) -> bool:
        """Return True when nothing runs or waits."""
        return not self.running and not self.waiting

    def enter(self, priority: Priority, key: str, tokens: int, capacity: int) -> Ticket | None:
        """Return None for a job that may run at once, or the ticket of one that waits.

        In a full queue it takes the place of the job that would be served last, if it would be served before that: who
        sends too much is refused, not who comes last. Raises: QueueFull.
        """
        waiting = self.waiting
        if self.running < capacity and not waiting:
            self.running += 1
            return None
        everywhere = waiting + self._elsewhere()
        if everywhere >= self._limit and not self._displace(priority, key):
            raise QueueFull(
                f"{everywhere} jobs wait for this model, which is the limit", retry_after_s=self.retry_after_s(capacity)
            )
        ticket = Ticket(key, tokens, self._clock())
        self._lanes[priority].push(ticket)
        self.waiting += 1
        return ticket

    def leave(self, priority: Priority, ticket: Ticket) -> None:
        """Take out a job whose client no longer waits; if it was granted a moment ago, its slot is free again."""
        if ticket.left:
            return
        if ticket.granted.is_set():
            self.running -= 1
        else:
            self._lanes[priority].leave(ticket)
            self.waiting -= 1

    def done(self, took_s: float) -> None:
        """Count a job that ended."""
        self.running -= 1
        self.job_s += 0.1 * (took_s - self.job_s)

    def grant(self, capacity: int) -> None:
        """Let as many waiting jobs run as there is room for."""
        now = self._clock()
        while self.running < capacity:
            lane = self._next_lane(now)
            if lane is None:
                return
            self.running += 1
            self.waiting -= 1
            lane.pop(now).granted.set()

    def retry_after_s(self, capacity: int) -> float:
        """Return about when there is room again, from how long jobs have taken."""
        return min(LONGEST_RETRY_S, max(1.0, self.waiting * self.job_s / max(1, capacity)))

    def counts(self) -> Iterator[tuple[str, int]]:
        """Yield how many jobs of each priority wait."""
        for priority, lane in self._lanes.items():
            yield priority, len(lane)

    def waits(self) -> Iterator[tuple[Priority, int, float]]:
        """Yield, for each priority of which jobs wait, how many do and the longest wait, in seconds."""
        now = self._clock()
        for priority, lane in self._lanes.items():
            if len(lane):
                yield priority, len(lane), lane.waited_s(now)

    def _displace(self, priority: Priority, key: str) -> bool:
        """Make room for a job of this kind at the cost of the last. Return False when it would itself be the last."""
        last = next((one for one in reversed(PRIORITIES) if len(self._lanes[one])), None)
        if last is None:
            return False
        lane = self._lanes[last]
        if PRIORITIES.index(priority) >= PRIORITIES.index(last) and (
            priority != last or lane.start_of(key) >= lane.last_start()
        ):
            return False
        lane.displace_last()
        self.waiting -= 1
        return True

    def _next_lane(self, now: float) -> Lane | None:
        waiting = [lane for lane in self._lanes.values() if len(lane)]
        starving = [lane for lane in waiting[1:] if now - lane.served_at >= self._starvation_s]
        if starving:
            return min(starving, key=lambda lane: lane.served_at)
        return waiting[0] if waiting else None


class Queues:
    """The queues of all models that are in use. `capacity` tells how many jobs of a model can run at once."""

    def __init__(
        self,
        capacity: Callable[[str], int],
        *,
        limit: int = 256,
        starvation_s: float = STARVATION_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = capacity
        self._limit = limit
        self._starvation_s = starvation_s
        self._clock = clock
        self._queues: dict[str, ModelQueue] = {}
        self.elsewhere: Callable[[str], int] = lambda model: 0
        """Tells how many jobs of a model wait at other processes: the limit is of all together."""

    def of(self, model: str) -> ModelQueue:
        """Return a model's queue."""
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = ModelQueue(
                self._limit, self._starvation_s, self._clock, lambda: self.elsewhere(model)
            )
        return queue

    def waiting(self, model: str) -> int:
        """Return how many jobs wait for a model."""
        queue = self._queues.get(model)
        return queue.waiting if queue else 0

    def demand(self, model: str) -> int:
        """Return how many jobs of a model run or wait."""
        queue = self._queues.get(model)
        return queue.running + queue.waiting if queue else 0

    def demands(self) -> dict[str, tuple[int, int]]:
        """Return, by model, how many jobs run and how many wait."""
        return {model: (queue.running, queue.waiting) for model, queue in self._queues.items()}

    def capacity(self, model: str) -> int:
        """Return how many jobs of a model can run at once."""
        return self._capacity(model)

    def grant(self, model: str) -> None:
        """Let waiting jobs of a model run. Of the queues that nobody uses a few stay: they know how long jobs take."""
        queue = self._queues.get(model)
        if queue is None:
            return
        if queue.waiting:
            queue.grant(self._capacity(model))
        if queue.idle and len(self._queues) > KEPT_QUEUES:
            del self._queues[model]

    def grant_all(self) -> bool:
        """Look at every queue again after workers have come or gone. Return True while anybody waits."""
        for model in list(self._queues):
            self.grant(model)
        return any(queue.waiting for queue in self._queues.values())

    def waits(self) -> list[tuple[str, Priority, int, float]]:
        """Return, by model and priority, how many jobs wait and the longest wait, in seconds."""
        return [(model, *wait) for model, queue in sorted(self._queues.items()) for wait in queue.waits()]

    def counts(self) -> dict[tuple[str, str], int]:
        """Return how many jobs wait, by model and priority."""
        used = {model: queue for model, queue in self._queues.items() if not queue.idle}
        return {(model, priority): n for model, queue in used.items() for priority, n in queue.counts()}
