"""The terminal of `rbee top`: a screen of its own that is drawn again, keys, and the old screen back at its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from rich.live import Live

from rbee.cli.terminal import console
from rbee.cli.top_view import frame

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rbee.cli.top import Reader

LOOK_S = 0.1
"""How often a new size of the terminal, and a new reading, are looked for."""
FOOTER = "q: quit"


def watch(reader: Reader) -> None:
    """Show what a reader reads until the person has enough. Raises: RbeeError for what will not pass."""
    terminal = _Terminal()
    with terminal.taken(), Live(screen=True, auto_refresh=False, console=console()) as live:
        reader.start()
        try:
            _loop(reader, live, terminal)
        finally:
            reader.stop()
    if reader.failure is not None:
        raise reader.failure


def _loop(reader: Reader, live: Live, terminal: _Terminal) -> None:
    drawn: tuple[int, int] | None = None
    while reader.failure is None:
        room = (live.console.size.width, live.console.size.height)
        if room != drawn or reader.renewed.is_set():
            reader.renewed.clear()
            live.update(_picture(reader, room), refresh=True)
            drawn = room
        if _key(LOOK_S) in ("q", "Q", "\x04"):
            return
        if terminal.stop_wanted:
            terminal.stop(live)
            drawn = None


def _picture(reader: Reader, room: tuple[int, int]) -> RenderableType:
    last = reader.last
    away_s = time.time() - last.away_since if last.problem else 0.0
    return frame(last.load, room, problem=last.problem, away_s=away_s, footer=FOOTER)


def _key(timeout_s: float) -> str:
    """Return what was typed within so many seconds; where nobody can type, nothing."""
    if not sys.stdin.isatty():
        time.sleep(timeout_s)
        return ""
    readable, _, _ = select.select([sys.stdin], [], [], timeout_s)
    # What a lone terminal sends at its end is an end of file.
    return (os.read(sys.stdin.fileno(), 1).decode(errors="replace") or "q") if readable else ""


class _Terminal:
    """Keys come as they are typed, and are not shown; the terminal is put back however this ends.

    After Ctrl+Z the shell must not come back to this program's screen either.
    """

    def __init__(self) -> None:
        self.stop_wanted = False
        self._typed = sys.stdin.isatty()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Take the terminal."""
        before = termios.tcgetattr(sys.stdin) if self._typed else None
        kept = {number: signal.signal(number, call) for number, call in self._signals().items()}
        try:
            if before is not None:
                tty.setcbreak(sys.stdin)
            yield
        finally:
            if before is not None:
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
            for number, call in kept.items():
                signal.signal(number, call)

    def stop(self, live: Live) -> None:
        """Give the screen back, stop until the shell wants this program on, and take it again."""
        self.stop_wanted = False
        live.stop()
        os.kill(os.getpid(), signal.SIGSTOP)
        # The shell has put back its own modes in the meantime.
        if self._typed:
            tty.setcbreak(sys.stdin)
        live.start()

    def _signals(self) -> dict[signal.Signals, Callable[[int, FrameType | None], None]]:
        def end(number: int, stack: FrameType | None) -> NoReturn:
            sys.exit(128 + number)

        def stop(number: int, stack: FrameType | None) -> None:
            self.stop_wanted = True

        return {signal.SIGTERM: end, signal.SIGHUP: end, signal.SIGTSTP: stop}
