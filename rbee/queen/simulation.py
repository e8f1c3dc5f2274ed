"""Try a routing script on jobs that were, or that are made up: pure decisions over facts, no queen and no worker."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rbee.errors import InvalidScript, Refused
from rbee.queen.script import ADMITS, Compiled, admits, decide, default_script, freeze
from rbee.queen.view import counted

WAITS, REFUSED = "(waits)", "(refused)"
"""What stands for a worker where a job has none."""

Record = Mapping[str, Any]


class TriedJob(NamedTuple):
    """A job to decide on: when it comes, in seconds, how long it holds a slot, and its facts."""

    at_s: float
    duration_s: float
    task: Record


@dataclass
class Outcome:
    """What a script did with jobs: how many went where, what failed, and the time of its decisions in µs."""

    jobs: int = 0
    chosen: Counter[str] = field(default_factory=Counter)
    busiest: Counter[str] = field(default_factory=Counter)
    """The most jobs at a time, by worker."""
    problems: Counter[str] = field(default_factory=Counter)
    times_us: list[float] = field(default_factory=list)


class Asked:
    """A script that is asked as the queen asks it: admission first, and the built-in one where it fails."""

    def __init__(self, script: Compiled, outcome: Outcome) -> None:
        self._script = script
        self._default = default_script()
        self._outcome = outcome

    def choose(self, task: Record, workers: Sequence[Record], queue_depth: int) -> list[str]:
        """Return the ids of the chosen workers, or what stands for none."""
        frozen = freeze(workers)
        start = time.perf_counter_ns()
        try:
            if ADMITS in self._script.functions:
                admits(self._script, task, queue_depth)
        except Refused:
            return [REFUSED]
        except InvalidScript as problem:
            self._outcome.problems[problem.message] += 1
        script = self._script if self._script.route else self._default
        try:
            indices = decide(script, task, frozen)
        except InvalidScript as problem:
            self._outcome.problems[problem.message] += 1
            indices = decide(self._default, task, frozen)
        self._outcome.times_us.append((time.perf_counter_ns() - start) / 1000)
        return [str(workers[index]["id"]) for index in indices] or [WAITS]


def simulate(script: Compiled, jobs: Iterable[TriedJob], workers: Mapping[str, Sequence[Record]]) -> Outcome:
    """Send jobs to workers as a script says. `workers` are those of each model, all of them idle at the start.

    A job holds a slot of its worker for its duration, which is what the next decisions see; a full worker takes it all
    the same, as a real one queues it.
    """
    outcome = Outcome()
    asked = Asked(script, outcome)
    running: list[tuple[float, str]] = []
    busy: Counter[str] = Counter()
    for job in sorted(jobs, key=lambda job: job.at_s):
        while running and running[0][0] <= job.at_s:
            busy[heapq.heappop(running)[1]] -= 1
        places = [
            counted(place, busy[place["id"]], place["ttft_ms"], place["tokens_per_second"], place["prefix_match"])
            for place in workers.get(str(job.task["model"]), ())
        ]
        first = asked.choose(job.task, places, len(running))[0]
        outcome.jobs += 1
        outcome.chosen[first] += 1
        if first not in (WAITS, REFUSED) and job.duration_s > 0:
            heapq.heappush(running, (job.at_s + job.duration_s, first))
            busy[first] += 1
            outcome.busiest[first] = max(outcome.busiest[first], busy[first])
    return outcome


class Replayed(NamedTuple):
    """One decision of the past beside that of another script."""

    at: float
    task: Record
    then: str
    now: str


def replay(script: Compiled, lines: Iterable[Mapping[str, Any]], since: float, outcome: Outcome) -> Iterator[Replayed]:
    """Yield past decisions, as the queen's log has them, beside what a script decides on the same facts.

    Facts of workers are as of at most 5 s before the decision. Lines whose workers are not known any more are left out.
    """
    asked = Asked(script, outcome)
    places: dict[int, Sequence[Record]] = {}
    for line in lines:
        if "workers" in line:
            places[line["places"]] = line["workers"]
        elif line["at"] >= since and line["places"] in places:
            workers = places[line["places"]]
            now = asked.choose(line["task"], workers, sum(worker["in_flight"] for worker in workers))[0]
            then = line["chosen"][0] if line["chosen"] else WAITS
            outcome.jobs += 1
            outcome.chosen[now] += 1
            yield Replayed(line["at"], line["task"], then, now)
