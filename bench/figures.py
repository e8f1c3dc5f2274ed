"""What every measurement prints: its conditions, and tables in Markdown with least, median and greatest."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GPU_DEVICES = ("/dev/nvidia0", "/dev/kfd")


@dataclass(frozen=True)
class Spread:
    """The least, the median and the greatest of some values."""

    least: float
    median: float
    greatest: float

    def cells(self, digits: int) -> list[str]:
        """Return the three as text with so many decimals."""
        return [f"{value:.{digits}f}" for value in (self.least, self.median, self.greatest)]

    def text(self, digits: int) -> str:
        """Return the three in one cell."""
        return " / ".join(self.cells(digits))


def spread(values: Iterable[float]) -> Spread:
    """Return the spread of at least one value."""
    known = list(values)
    return Spread(min(known), statistics.median(known), max(known))


def ratio(values: Sequence[float], others: Sequence[float]) -> Spread | None:
    """Return the spread of the ratios of values measured in the same rounds; None where there is nothing to divide by.

    A round whose divisor is 0 (no whole answer) is left out.
    """
    found = [value / other for value, other in zip(values, others, strict=True) if other]
    return spread(found) if found else None


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, its columns aligned; the first column is text, the others are figures."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, rule)
    padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def conditions(packages: Sequence[str]) -> str:
    """Return one line that says when, on what and with which versions the figures were made."""
    cores = len(os.sched_getaffinity(0))
    gpu = "with a GPU" if any(Path(device).exists() for device in GPU_DEVICES) else "no GPU"
    load = os.getloadavg()[0]
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    today = datetime.datetime.now(datetime.UTC).date()
    machine = f"{cores} cores, {gpu}, {platform.system()} {platform.machine()}, load {load:.1f} before the run"
    return f"{today}; {machine}; Python {platform.python_version()}; {versions}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
