"""Numbers for Prometheus: plain ones while jobs run, made into samples only when somebody asks for the page.

Everything here is written in the event loop's thread alone, so nothing is locked: a job is counted in less than half of
the time that prometheus_client's own counters take.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.utils import floatToGoString

from rbee.errors import RbeeError
from rbee.queen.client_watch import ClientGone

Labels = tuple[str, ...]
Wanted = Callable[[Labels], bool]

OTHER = "other"
"""The label of what is named from outside, once there are too many names or nobody here knows it."""
OK, CANCELLED, UPSTREAM_ERROR = "ok", "cancelled", "upstream_error"
ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def everything(labels: Labels) -> bool:
    """Want every series."""
    return True


class Family:
    """The series of one name in Prometheus' text format 0.0.4."""

    kind = "gauge"

    def __init__(self, name: str, about: str, labels: Sequence[str]) -> None:
        self.name, self.labels = name, tuple(labels)
        self._head = f"# HELP {name} {about}\n# TYPE {name} {self.kind}\n"
        self._shown: dict[Labels, str] = {}

    def text(self, wanted: Wanted = everything) -> str:
        """Return the series whose labels are wanted; of a choice that is empty, nothing at all."""
        lines = "".join(self.lines(wanted))
        return self._head + lines if lines or wanted is everything else ""

    def lines(self, wanted: Wanted) -> Iterator[str]:
        """Yield the lines of the series whose labels are wanted."""
        raise NotImplementedError

    def shown(self, labels: Labels) -> str:
        """Return labels as they stand between braces. They are asked for with every page, and change never."""
        found = self._shown.get(labels)
        if found is None:
            pairs = sorted(zip(self.labels, labels, strict=True))
            found = self._shown[labels] = ",".join(f'{name}="{value.translate(ESCAPED)}"' for name, value in pairs)
        return found


class Numbers(Family, dict[Labels, float]):
    """A gauge: `numbers["acme",] += 1`."""

    def __init__(self, name: str, about: str, labels: Sequence[str]) -> None:
        super().__init__(name, about, labels)
        if not labels:
            self[()] = 0

    def __missing__(self, labels: Labels) -> float:
        return 0

    def lines(self, wanted: Wanted) -> Iterator[str]:
        for labels, value in self.items():
            if wanted(labels):
                where = f"{{{self.shown(labels)}}}" if labels else ""
                yield f"{self.name}{where} {float(value)}\n"


class Counts(Numbers):
    """A counter: `counts["chat", "ok"] += 1`. Its name ends with `_total`, its unit stands before that."""

    kind = "counter"


class Distribution:
    """How many values there were up to each bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value; a bound includes what equals it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Distributions(Family, dict[Labels, Distribution]):
    """A histogram: `waits["interactive",].observe(0.2)`. Its name ends with its unit."""

    kind = "histogram"

    def __init__(self, name: str, about: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        super().__init__(name, about, labels)
        self._bounds = bounds
        self._ends = [*map(floatToGoString, bounds), "+Inf"]
        if not labels:
            self[()] = Distribution(bounds)

    def __missing__(self, labels: Labels) -> Distribution:
        made = self[labels] = Distribution(self._bounds)
        return made

    def lines(self, wanted: Wanted) -> Iterator[str]:
        for labels, one in self.items():
            if not wanted(labels):
                continue
            shown = self.shown(labels)
            start, count = f"{self.name}_bucket{{{shown}{',' if shown else ''}le=", 0
            for end, count in zip(self._ends, accumulate(one.counts), strict=True):
                yield f'{start}"{end}"}} {count}.0\n'
            where = f"{{{shown}}}" if shown else ""
            yield f"{self.name}_sum{where} {one.total}\n{self.name}_count{where} {count}.0\n"


class Names:
    """The values of a label that come from outside: at most so many, and only those that are `known`."""

    def __init__(self, most: int, known: Callable[[str], bool] = lambda name: True) -> None:
        self._most = most
        self._known = known
        self._names: set[str] = set()

    def label(self, name: str) -> str:
        """Return the name, or `OTHER` for one that has no series of its own."""
        if name in self._names:
            return name
        if len(self._names) < self._most and self._known(name):
            self._names.add(name)
            return name
        return OTHER


def outcome_of(problem: BaseException | None) -> str:
    """Return how a job ended, as a label; None is an answer."""
    if problem is None:
        return OK
    if isinstance(problem, RbeeError):
        return code_of(problem)
    return CANCELLED if isinstance(problem, (ClientGone, GeneratorExit)) else "error"


def code_of(problem: RbeeError) -> str:
    """Return an error's code as a label; an engine may answer any code, and those of its own are one."""
    return problem.code if problem.code in CODES else UPSTREAM_ERROR


def _codes(family: type[RbeeError]) -> Iterator[str]:
    if family.code:
        yield family.code
    for kind in family.__subclasses__():
        yield from _codes(kind)


CODES = frozenset(_codes(RbeeError))
