"""What `rbee top` shows, as a picture of so many columns and lines; it decides nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rbee.cli.terminal import COLOURS, age, clean, size
from rbee.wire.fleet import Device
from rbee.wire.load import HiveLoad, QueenLoad, WorkerLoad

NARROW, WIDE = 80, 1000
SECTION_LINES = 2
"""An empty line and a section's heading."""
FEWEST_ROWS = 2
NUMBERS = 41
"""Columns of the workers' table beside the names of worker and model, with the gaps."""
LATE_S = 10.0
"""A wait that is shown in yellow."""


@dataclass(frozen=True)
class Section:
    """A table whose cells are as short as they have to be; `right` are its columns of numbers."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    right: frozenset[str] = frozenset()


def frame(
    load: QueenLoad, room: tuple[int, int] | None, *, problem: str = "", away_s: float = 0.0, footer: str = ""
) -> RenderableType:
    """Return the picture in `room`, columns by lines; without, as large as it is. `problem`: why it is an old one."""
    width, height = room or (WIDE, 0)
    head = _head(load, width, problem, away_s)
    trouble = [Text(cut(f"{clean(p.where)}: {clean(p.message)}", width), style="red") for p in load.problems]
    sections = [_hives(load, width), _workers(load, width, height), _queues(load, width)]
    foot = [Text(footer[:width], style="dim")] if footer else []
    if height:
        trouble = trouble[: max(1, height // 8)]
        left = height - len(head) - len(foot) - (len(trouble) + 1 if trouble else 0)
        rooms = share([len(section.rows) for section in sections], left)
    else:
        rooms = [len(section.rows) for section in sections]
    parts: list[RenderableType] = [*head]
    if trouble:
        parts += [Text(), *trouble]
    for section, rows in zip(sections, rooms, strict=True):
        if section.rows and rows > 0:
            parts += [Text(), _table(section, rows)]
    return Group(*parts, *foot)


def share(wanted: Sequence[int], lines: int) -> list[int]:
    """Return how many rows each section gets of so many lines; what does not fit is said in the last of its rows.

    Every section that has rows gets a few; the rest goes to them from the last, the shortest on most fleets, on.
    """
    shown = [index for index, rows in enumerate(wanted) if rows]
    left = lines - SECTION_LINES * len(shown)
    given = [0] * len(wanted)
    for index in shown:
        given[index] = max(0, min(wanted[index], FEWEST_ROWS, left))
        left -= given[index]
    for index in reversed(shown):
        more = max(0, min(wanted[index] - given[index], left // 2 if index else left))
        given[index] += more
        left -= more
    for index in reversed(shown):  # what nobody took
        more = max(0, min(wanted[index] - given[index], left))
        given[index] += more
        left -= more
    return given


def shortened(text: str, width: int) -> str:
    """Return a text in at most `width` columns: its middle goes, for names of models differ at both ends."""
    if len(text) <= width:
        return text
    if width < 3:
        return text[: max(0, width)]
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def cut(text: str, width: int) -> str:
    """Return a sentence in at most `width` columns and one line."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _head(load: QueenLoad, width: int, problem: str, away_s: float) -> list[Text]:
    state = ", draining" if load.draining else ""
    first = f"rbee {load.version}  {load.url}  up {age(load.at - load.started_at)}{state}"
    clock = time.strftime("%H:%M:%S", time.localtime(load.at))
    lines = [Text(shortened(first, width - len(clock) - 2), style="bold")]
    lines[0].append(f"  {clock}", style="dim")
    figures = [
        (f"{load.in_flight} in flight", ""),
        (f"{load.waiting} waiting", "yellow" if load.waiting else ""),
        (f"{_figure(load.jobs_per_second)} jobs/s", ""),
        (f"{_figure(load.tokens_per_second)} tokens/s", ""),
        (f"{_figure(load.refused_per_second)} refused/s", "yellow" if load.refused_per_second else ""),
        (f"{_figure(load.retries_per_second)} retries/s", "yellow" if load.retries_per_second else ""),
    ]
    second = Text()
    for text, style in figures:
        second.append(f"{'  ' if second else ''}{text}", style=style)
    second.truncate(width)
    lines.append(second)
    if problem:
        away = f"The queen is away for {age(away_s)}: {clean(problem)}. Looking again."
        lines.append(Text(cut(away, width), style="bold red"))
    return lines


def _hives(load: QueenLoad, width: int) -> Section:
    name = max(8, min(24, width // 4))
    room = width - name - 30
    rows = [
        (
            shortened(hive.hive, name),
            hive.state,
            str(len(hive.workers)),
            str(sum(worker.in_flight for worker in hive.workers)),
            cut(clean(hive.reason) or devices(hive.devices), max(10, room)),
        )
        for hive in load.hives
    ]
    return Section("hive", ("hive", "state", "workers", "jobs", "devices"), rows, frozenset({"workers", "jobs"}))


def _workers(load: QueenLoad, width: int, height: int) -> Section:
    """The workers in their order, or, where they cannot all be shown, the busiest first."""
    found = [(hive, worker) for hive in load.hives for worker in hive.workers]
    if height and len(found) > height // 2:
        found.sort(key=lambda one: (-_busy(one[1]), one[1].id))
    room = max(20, width - NUMBERS)
    name, model = room // 2, room - room // 2
    rows = [
        (
            shortened(worker.id, name),
            shortened(clean(worker.model), model),
            _state(hive, worker),
            f"{worker.in_flight}/{worker.slots}",
            _figure(worker.tokens_per_second),
            _milliseconds(worker.ttft_ms),
        )
        for hive, worker in found
    ]
    columns = ("worker", "model", "state", "busy", "tok/s", "first")
    return Section("worker", columns, rows, frozenset({"busy", "tok/s", "first"}))


def _queues(load: QueenLoad, width: int) -> Section:
    room = max(10, width - 40)
    rows = [
        (shortened(clean(queue.model), room), queue.priority, str(queue.waiting), age(queue.longest_wait_s))
        for queue in load.queues
    ]
    return Section("queue", ("queue", "priority", "waiting", "longest"), rows, frozenset({"waiting", "longest"}))


def _state(hive: HiveLoad, worker: WorkerLoad) -> str:
    if worker.ejected:
        return "ejected"
    if worker.lost or hive.state in ("lost", "unreachable"):
        return "lost" if worker.state == "ready" else str(worker.state)
    if worker.state == "starting" and worker.progress:
        return f"start {worker.progress:.0%}"
    return str(worker.state)


def _busy(worker: WorkerLoad) -> float:
    """What deserves a look first: trouble, then work."""
    trouble = worker.ejected or worker.lost or worker.state == "failed"
    return 1e9 if trouble else worker.in_flight + worker.tokens_per_second / 1e6


def devices(found: Iterable[Device]) -> str:
    """Return devices in a few words, equal ones together: what of their memory is used."""
    said = []
    for (kind, name), group in groupby(found, key=lambda device: (device.kind, device.name)):
        same = list(group)
        total = sum(device.memory_total_bytes for device in same)
        used = total - sum(device.memory_free_bytes for device in same)
        count = f"{len(same)} x " if len(same) > 1 else ""
        memory = f" {size(max(0, used))} of {size(total)} used" if total else ""
        said.append(f"{count}{clean(name) or kind}{memory}")
    return ", ".join(said)


def _table(section: Section, rows: int) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in section.columns:
        justify = "right" if column in section.right else "left"
        grid.add_column(column.upper(), no_wrap=True, overflow="ellipsis", justify=justify)  # type: ignore[arg-type]
    fits = len(section.rows) <= rows
    shown = section.rows if fits else section.rows[: rows - 1]
    for row in shown:
        grid.add_row(*(Text(cell or "-", style=_colour(cell)) for cell in row))
    if not fits:
        grid.add_row(Text(f"… {len(section.rows) - len(shown)} more", style="dim"))
    return grid


def _colour(cell: str) -> str:
    return "red" if cell == "ejected" else "yellow" if cell.startswith("start ") else COLOURS.get(cell, "")


def _figure(number: float) -> str:
    """Return a rate in few characters; a small one is not shown as none."""
    if number >= 100 or number == 0:
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 0.1 else "<0.1"


def _milliseconds(number: float) -> str:
    if not number:
        return ""
    return f"{number:.0f} ms" if number < 10_000 else f"{number / 1000:.0f} s"
