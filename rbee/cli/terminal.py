"""What a person sees: text without control characters, tables, colours, and a spinner while something lasts."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SPINNER_AFTER_S = 0.15
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COLOURS = {
    "ready": "green",
    "ok": "green",
    "online": "green",
    "starting": "yellow",
    "draining": "yellow",
    "warn": "yellow",
    "stale": "yellow",
    "failed": "red",
    "fail": "red",
    "lost": "red",
    "stopped": "dim",
}


def clean(text: str) -> str:
    """Return `text` without control characters other than tab and newline.

    What a model or another machine says must not move the cursor, retitle the window or fill the clipboard.
    """
    return _CONTROL.sub("", text)


def console(*, stderr: bool = False) -> Console:
    """Return a rich console; where there is no terminal, lines are as long as they are."""
    from rich.console import Console

    file = sys.stderr if stderr else sys.stdout
    return Console(
        file=file, highlight=False, markup=False, soft_wrap=not file.isatty(), width=None if file.isatty() else 1000
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns, with a colour for the words that say how something fares."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        grid.add_column(column.upper(), overflow="fold")
    for row in rows:
        cells = [clean(str(cell)) for cell in row]
        grid.add_row(*(Text(cell or "-", style=COLOURS.get(cell, "")) for cell in cells))
    write(grid)


def write(what: RenderableType) -> None:
    """Print what rich draws, without the spaces to which it fills its lines."""
    out = console()
    with out.capture() as capture:
        out.print(what)
    sys.stdout.write("".join(line.rstrip() + "\n" for line in capture.get().splitlines()))


def size(count_bytes: int) -> str:
    """Return a number of bytes as a person reads it, in binary units (IEC 80000-13)."""
    amount = float(count_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def age(seconds: float) -> str:
    """Return a span of time in its two largest units."""
    whole = max(0, int(seconds))
    for unit_s, unit, part_s, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit_s:
            return f"{whole // unit_s} {unit} {whole % unit_s // part_s} {part}"
    return f"{whole} s"


class Waiting:
    """A spinner on stderr that says what is happening, shown once a wait lasts and stderr is a terminal.

    `detail` is asked twice a second for a word more, such as how far a model is loaded.
    """

    def __init__(self, text: str = "", *, detail: Callable[[], str] | None = None, quiet: bool = False) -> None:
        self._text = text
        self._detail = detail
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if not quiet and sys.stderr.isatty():
            self._thread = threading.Thread(target=self._spin, name="spinner", daemon=True)

    def step(self, text: str, detail: Callable[[], str] | None = None) -> None:
        """Say what is happening."""
        self._text, self._detail = text, detail

    def stop(self) -> None:
        """Take the spinner away; what is printed next stands on a clean line."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Waiting:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _spin(self) -> None:
        if self._stopped.wait(SPINNER_AFTER_S):
            return
        from rich.text import Text

        with console(stderr=True).status(Text(self._text)) as status:
            while not self._stopped.wait(0.1):
                detail = self._detail
                status.update(Text(clean(f"{self._text} {detail() if detail else ''}".rstrip())))
