"""Hold many open streams that trickle for a while: errors, gaps between tokens as clients see them, memory a stream.

usage: python -m bench.gateway.streams [--streams N] [--rate N] [--seconds S] [--rounds N] [--only rbee-1]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.figures import conditions, spread, table
from bench.gateway.__main__ import PACKAGES, contenders, stopped_in_good_order
from bench.gateway.contenders import DIRECT, RBEE, Contender, all_running, compiled, mock, versions
from bench.gateway.load import Clients, Streams, rest

WARM_UP_STREAMS = 20
LOOK_EVERY_S = 0.5
GUARD_S = 120.0
"""How much longer than the mock takes a contender may take, before what has not come counts as lost."""


@dataclass
class Memory:
    """The memory that a contender held before its streams, and at most while they ran."""

    before_bytes: int
    most_bytes: int = 0


@dataclass
class Held:
    """One contender with all streams open, once."""

    streams: Streams
    memory: Memory
    cpu_s: float

    def kb_a_stream(self, streams: int) -> float:
        """Return how much its memory grew for each stream, in KB of 1024 bytes."""
        return (self.memory.most_bytes - self.memory.before_bytes) / 1024 / streams


@dataclass
class Rounds:
    """What all rounds gave, by contender."""

    held: dict[str, list[Held]] = field(default_factory=lambda: defaultdict(list))


def main() -> None:
    """Start everything, hold the streams, print the table."""
    given = arguments()
    print(f"{conditions(PACKAGES)}; {versions(given.litellm)}", flush=True)
    tokens = given.rate * given.seconds
    print(f"{given.streams} streams of {tokens} tokens, {given.rate} tokens/s each, {given.rounds} rounds.", flush=True)
    rounds = Rounds()
    with stopped_in_good_order(), tempfile.TemporaryDirectory(prefix="rbee-bench-streams-") as place:
        folder = Path(place)
        clients = Clients(folder, compiled("clients", folder), tokens)
        upstream = mock(compiled("mock", folder), tokens=tokens, rate=given.rate)
        with upstream as direct, all_running(given.only, given.litellm, direct) as running:
            for number in range(given.rounds):
                for one in running[number % len(running) :] + running[: number % len(running)]:
                    rounds.held[one.name].append(held(clients, one, given))
    print(f"\n{figures(rounds, given.streams)}")
    for name, of in rounds.held.items():
        for problem in sorted({one.streams.problem for one in of if one.streams.problem}):
            print(f"\nlost: {name}: {problem}")


def held(clients: Clients, contender: Contender, given: argparse.Namespace) -> Held:
    """Open all streams at one contender and read them to their end."""
    limit_s = given.seconds + GUARD_S
    # What a process needs once, whatever it does, is not the streams'.
    clients.streams(contender, clients=WARM_UP_STREAMS, seconds=limit_s, once=True)
    rest(contender)
    cpu_s = contender.cpu_s()
    with watched_memory(contender) as memory:
        streams = clients.streams(contender, clients=given.streams, seconds=limit_s, once=True)
    return Held(streams, memory, contender.cpu_s() - cpu_s)


@contextlib.contextmanager
def watched_memory(contender: Contender) -> Iterator[Memory]:
    """Look at a contender's memory again and again."""
    memory = Memory(contender.memory_bytes())
    enough = threading.Event()

    def look() -> None:
        while not enough.wait(LOOK_EVERY_S):
            memory.most_bytes = max(memory.most_bytes, contender.memory_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield memory
    finally:
        enough.set()
        watcher.join()


def figures(rounds: Rounds, streams: int) -> str:
    """Return the table; each cell is least / median / greatest of the rounds."""
    gaps: tuple[Callable[[Held], float], ...] = (
        lambda one: one.streams.gap.p50_ms,
        lambda one: one.streams.gap.p99_ms,
        lambda one: one.streams.gap.max_ms,
    )
    rows = []
    for name, of in rounds.held.items():
        direct = rounds.held[DIRECT]
        cells = [name, f"{sum(one.streams.whole for one in of)} of {streams * len(of)}"]
        cells += [spread(value(one) for one in of).text(1) for value in gaps]
        cells += [spread(gaps[1](one) - gaps[1](other) for one, other in zip(of, direct, strict=True)).text(1)]
        cells += [spread(one.streams.first_token.p99_ms for one in of).text(1)]
        cells += [spread(one.kb_a_stream(streams) for one in of).text(1)]
        cells += [spread(100 * one.cpu_s / one.streams.seconds for one in of).text(0)]
        rows.append([*cells, spread(100 * one.streams.cpu_s / one.streams.seconds for one in of).text(0)])
    head = ["", "whole streams", "gap p50 ms", "gap p99 ms", "gap max ms", "gap p99 added ms", "first token p99 ms"]
    return table([*head, "KB a stream", "CPU %", "clients' CPU %"], rows)


def arguments() -> argparse.Namespace:
    """Return what stands on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000, help="open at the same time, begun within one second")
    parser.add_argument("--rate", type=int, default=20, help="tokens a second of each stream")
    parser.add_argument("--seconds", type=int, default=60, help="that each stream lasts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=contenders, default=[DIRECT, RBEE], help="names, or how they begin: nginx,rbee")
    parser.add_argument("--litellm", type=Path, help="LiteLLM's program of that name, in its own virtual environment")
    given = parser.parse_args()
    if min(given.streams, given.rate, given.seconds, given.rounds) < 1:
        sys.exit("--streams, --rate, --seconds and --rounds are at least 1")
    return given


if __name__ == "__main__":
    main()
