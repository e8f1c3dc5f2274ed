"""The tables of what was measured: figures of each cell, and ratios and differences within its rounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.figures import Spread, ratio, spread, table
from bench.gateway.contenders import DIRECT, LITELLM, NGINX, NGINX_2, RBEE, RBEE_2
from bench.gateway.load import Streams, Throughput

TOKENS = 64
COMPARED = (
    (RBEE, LITELLM),
    (RBEE, NGINX),
    (RBEE, DIRECT),
    (RBEE_2, NGINX),
    (RBEE_2, NGINX_2),
    (RBEE_2, RBEE),
    (NGINX, DIRECT),
)
SPREAD = ("min", "median", "max")


class Cell(NamedTuple):
    """One measurement of each round."""

    stream: bool
    clients: int

    @property
    def title(self) -> str:
        """Return what is measured, and its unit."""
        kind = f"streams of {TOKENS} tokens, chunks/s" if self.stream else "whole answers, requests/s"
        return f"{kind}, {self.clients} client{'s' * (self.clients > 1)}"


@dataclass(frozen=True)
class Measured:
    """What wrk counted, and what it took the contender and wrk."""

    load: Throughput
    cpu_s: float
    memory_mb: float
    wrk_cpu_s: float

    @property
    def per_s(self) -> float:
        """Return the whole answers in a second."""
        return self.load.whole / self.load.seconds


@dataclass(frozen=True)
class Results:
    """What all counted rounds gave, in their order."""

    loads: dict[tuple[Cell, str], list[Measured]] = field(default_factory=lambda: defaultdict(list))
    streams: dict[str, list[Streams]] = field(default_factory=lambda: defaultdict(list))


def report(results: Results, counts: Iterable[int], names: Sequence[str]) -> str:
    """Return all tables, and below them why answers were lost."""
    cells = [Cell(stream, count) for stream in (False, True) for count in counts]
    parts = [throughput(cell, {name: results.loads[cell, name] for name in names}) for cell in cells]
    parts += [ratios(results, cells, names)]
    one = Cell(False, 1)
    if one in cells:
        parts += [added_latency({name: results.loads[one, name] for name in names})]
    parts += [first_token({name: results.streams[name] for name in names})]
    return "\n\n".join([*parts, *problems(results)])


def throughput(cell: Cell, of: dict[str, list[Measured]]) -> str:
    """Return the figures of one cell."""
    units = TOKENS if cell.stream else 1
    rows = []
    for name, rounds in of.items():
        cpu = [1000 * one.cpu_s / one.load.whole for one in rounds if one.load.whole]
        rows.append(
            [
                name,
                *spread(units * one.per_s for one in rounds).cells(0),
                *(f"{_median(rounds, value):.2f}" for value in (lambda m: m.load.p50_ms, lambda m: m.load.p99_ms)),
                spread(cpu).text(3) if cpu else "-",
                f"{_median(rounds, lambda m: m.memory_mb):.0f}",
                str(sum(one.load.lost for one in rounds)),
                f"{_median(rounds, lambda m: 100 * m.wrk_cpu_s / m.load.seconds):.0f} %",
            ]
        )
    head = ("", *SPREAD, "p50 ms", "p99 ms", "CPU ms/answer", "memory MB", "lost", "wrk's CPU")
    return f"{cell.title}:\n\n{table(head, rows)}"


def ratios(results: Results, cells: Sequence[Cell], names: Sequence[str]) -> str:
    """Return the ratios of answers in a second, each taken within its round."""
    rows = []
    for one, other in COMPARED:
        for cell in cells if {one, other} <= set(names) else ():
            speeds = [[measured.per_s for measured in results.loads[cell, name]] for name in (one, other)]
            found = ratio(*speeds)
            rows.append([f"{one} / {other}: {cell.title}", *(found.cells(3) if found else ["-"] * 3)])
    return table(("ratio", *SPREAD), rows) if rows else ""


def added_latency(of: dict[str, list[Measured]]) -> str:
    """Return what each gateway adds to the median time of a whole answer with one client."""
    rows = []
    for name, rounds in of.items():
        if name != DIRECT:
            pairs = zip(rounds, of[DIRECT], strict=True)
            rows.append([name, *spread(one.load.p50_ms - direct.load.p50_ms for one, direct in pairs).cells(3)])
    return f"Added to the median time of a whole answer, 1 client, ms:\n\n{table(('', *SPREAD), rows)}"


def first_token(of: dict[str, list[Streams]]) -> str:
    """Return what each gateway adds to the time to the first token, beside the time itself."""
    rows = []
    for name, rounds in of.items():
        cells = [name, spread(one.first_token.p50_ms for one in rounds).text(2)]
        cells += [spread(one.first_token.p95_ms for one in rounds).text(2)]
        for value in (lambda one: one.first_token.p50_ms, lambda one: one.first_token.p95_ms):
            cells.append("-" if name == DIRECT else _added(rounds, of[DIRECT], value).text(2))
        rows.append([*cells, str(sum(one.lost for one in rounds))])
    head = ("", "p50 ms", "p95 ms", "added p50 ms", "added p95 ms", "lost")
    return f"Time to the first token, 32 streams at once (min / median / max):\n\n{table(head, rows)}"


def problems(results: Results) -> list[str]:
    """Return a line for each reason that an answer was not whole."""
    lines = {
        f"lost: {name}, {cell.title}: {one.load.problem}"
        for (cell, name), rounds in results.loads.items()
        for one in rounds
        if one.load.problem
    }
    lines |= {
        f"lost: {name}, first token: {one.problem}"
        for name, rounds in results.streams.items()
        for one in rounds
        if one.problem
    }
    return sorted(lines)


def _added(rounds: list[Streams], direct: list[Streams], value: Callable[[Streams], float]) -> Spread:
    return spread(value(one) - value(other) for one, other in zip(rounds, direct, strict=True))


def _median(rounds: list[Measured], value: Callable[[Measured], float]) -> float:
    return spread(value(one) for one in rounds).median
