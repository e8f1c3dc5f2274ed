"""Measure requests/s, stream chunks/s and latency of the queen, nginx, LiteLLM's proxy and no gateway, in turns.

usage: python -m bench.gateway [--rounds N] [--seconds S] [--clients 1,32,256] [--only rbee,nginx] [--litellm PROGRAM]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from bench.figures import conditions
from bench.gateway.contenders import DIRECT, NAMES, Contender, all_running, compiled, mock, versions
from bench.gateway.load import Clients, check_wrk, rest
from bench.gateway.report import Cell, Measured, Results, report

PACKAGES = ("rbee", "rhai-py", "gunicorn", "gevent", "falcon")
FIRST_TOKEN_CLIENTS = 32
WARM_UP_S = 1
ANSWERS_EACH, LONGEST_S = 5, 60
"""How many answers each client is to get at least, and how long a measurement may take for it."""

Length = Callable[[Cell, str], int]


def main() -> None:
    """Start everything, run the rounds, print the tables."""
    given = arguments()
    check_wrk()
    print(f"{conditions(PACKAGES)}; {versions(given.litellm)}", flush=True)
    with stopped_in_good_order(), everything(given) as (clients, running):
        names = ", ".join(one.name for one in running)
        print(f"{names}; {given.rounds} rounds of {given.seconds} s after one of {WARM_UP_S} s.", end=" ")
        print(f"The upstream wastes {given.upstream_us} µs a request." if given.upstream_us else "", flush=True)
        warm, results = Results(), Results()
        one_round(clients, running, given.clients, lambda *_: WARM_UP_S, warm)
        for number in range(1, given.rounds + 1):
            turn = running[number % len(running) :] + running[: number % len(running)]
            one_round(clients, turn, given.clients, partial(long_enough, warm, given.seconds), results)
            print(f"round {number} of {given.rounds} is done", file=sys.stderr, flush=True)
    print(report(results, given.clients, [one.name for one in running]))


def one_round(clients: Clients, turn: list[Contender], counts: list[int], seconds: Length, results: Results) -> None:
    """Measure each contender in each cell, and the time to its first token; all contenders of a cell in turn."""
    for cell in [Cell(stream, count) for stream in (False, True) for count in counts]:
        for one in turn:
            results.loads[cell, one.name].append(measured(clients, one, cell, seconds(cell, one.name)))
    cell = Cell(True, FIRST_TOKEN_CLIENTS)
    for one in turn:
        found = clients.streams(one, clients=cell.clients, seconds=seconds(cell, one.name))
        results.streams[one.name].append(found)
        rest(one)


def long_enough(warm: Results, seconds: int, cell: Cell, name: str) -> int:
    """Return for how long to measure, so that what is cut off at the end is little of the whole for slow ones, too."""
    kind = (cell.stream, name)
    fastest = max(one.per_s for (of, whose), ones in warm.loads.items() for one in ones if (of.stream, whose) == kind)
    wanted = ANSWERS_EACH * cell.clients / fastest if fastest else LONGEST_S
    return min(max(seconds, LONGEST_S), max(seconds, math.ceil(wanted)))


def measured(clients: Clients, contender: Contender, cell: Cell, seconds: int) -> Measured:
    """Let wrk ask a contender, and wait until what is left of it is done."""
    before_s = contender.cpu_s()
    load, wrk_cpu_s = clients.throughput(contender, stream=cell.stream, clients=cell.clients, seconds=seconds)
    cpu_s = contender.cpu_s() - before_s
    rest(contender)
    return Measured(load, cpu_s, contender.memory_bytes() / 1e6, wrk_cpu_s)


@contextlib.contextmanager
def everything(given: argparse.Namespace) -> Iterator[tuple[Clients, list[Contender]]]:
    """Compile the programs and run the contenders, each of which has answered once when this yields."""
    with tempfile.TemporaryDirectory(prefix="rbee-bench-gateway-") as place:
        folder = Path(place)
        clients = Clients(folder, compiled("clients", folder))
        with (
            mock(compiled("mock", folder), work_us=given.upstream_us) as upstream,
            all_running(given.only, given.litellm, upstream) as running,
        ):
            for one in running:
                clients.learn(one)
            yield clients, running


@contextlib.contextmanager
def stopped_in_good_order() -> Iterator[None]:
    """Unwind at Ctrl+C and at SIGTERM, so that every process that was started is ended, and say no more than that."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)


def contenders(text: str) -> Sequence[str]:
    """Return the contenders whose names begin with one of these words, and the direct way, the measure of them all."""
    words = (DIRECT, *text.split(","))
    for word in words:
        if not any(name.startswith(word) for name in NAMES):
            raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(NAMES)}")
    return [name for name in NAMES if name.startswith(words)]


def counts(text: str) -> list[int]:
    """Return numbers of clients. Raises: ValueError."""
    return [int(word) for word in text.split(",")]


def arguments() -> argparse.Namespace:
    """Return what stands on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after a short one that is not counted")
    parser.add_argument("--seconds", type=int, default=10, help="of each measurement")
    parser.add_argument("--clients", type=counts, default=[1, 32, 256], help="clients at once, one after the other")
    parser.add_argument("--only", type=contenders, default=list(NAMES), help="names, or how they begin: rbee,nginx-1")
    parser.add_argument("--upstream-us", type=int, default=0, help="µs of CPU time that the upstream wastes a request")
    parser.add_argument("--litellm", type=Path, help="LiteLLM's program of that name, in its own virtual environment")
    return parser.parse_args()


if __name__ == "__main__":
    main()
