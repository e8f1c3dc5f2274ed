"""`rbee top`: the picture in terminals of every size, and how it comes and goes."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_rig import HANG_GUARD_S, Person, wait_until
from rich.console import Console

from rbee.cli.top_view import devices, frame, share, shortened
from rbee.inventory.keywords import IGNORE_UNKNOWN
from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, running_queen
from rbee.wire.fleet import Device, Problem, WorkerState
from rbee.wire.load import HiveLoad, QueenLoad, QueueLoad, WorkerLoad

GIB = 1 << 30
LONG_MODEL = "llama-3.1-nemotron-70b-instruct-with-a-very-long-name-q4_k_m"


def big_fleet(hives: int, workers: int) -> QueenLoad:
    """Return the load of many machines with as many workers each."""
    return QueenLoad(
        version="1.0",
        url="http://queen.example:7833",
        pid=1,
        at=1_700_000_000.0,
        started_at=1_699_000_000.0,
        in_flight=hives,
        waiting=12,
        tokens_per_second=12345.6,
        jobs_per_second=0.04,
        hives=[
            HiveLoad(
                hive=f"machine-{hive:03}.in-a-rack-with-a-name",
                state="ready",
                devices=[Device(kind="cuda", name="NVIDIA H100", memory_total_bytes=80 * GIB)] * 8,
                workers=[
                    WorkerLoad(
                        id=f"machine-{hive:03}.in-a-rack-with-a-name/worker-{n}",
                        model=LONG_MODEL,
                        backend="vllm",
                        device="cuda",
                        state=WorkerState.READY,
                        slots=64,
                        in_flight=64 if hive == hives - 1 else 0,
                        ejected=hive == 0 and n == 0,
                        tokens_per_second=1234.5,
                        ttft_ms=12345.0,
                    )
                    for n in range(workers)
                ],
            )
            for hive in range(hives)
        ],
        queues=[QueueLoad(model=LONG_MODEL, priority="interactive", waiting=12, longest_wait_s=75.0)],
        problems=[Problem(where=f"host{n}", message="It does not answer. " * 20) for n in range(20)],
    )  # fmt: skip


def drawn(load: QueenLoad, width: int, height: int, **more: object) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(frame(load, (width, height), footer="q: quit", **more))  # type: ignore[arg-type]
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip("\n").split("\n")


@pytest.mark.parametrize("size", [(80, 24), (60, 15), (40, 10), (200, 60), (300, 100)])
@pytest.mark.parametrize("fleet", [(1, 1), (3, 2), (100, 10)])
def test_every_fleet_fits_every_terminal(size: tuple[int, int], fleet: tuple[int, int]) -> None:
    lines = drawn(big_fleet(*fleet), *size, problem="nothing answers", away_s=75.0)
    assert len(lines) <= size[1]
    assert max(map(len, lines)) <= size[0]
    assert "away for 1 min 15 s" in "".join(lines)
    assert lines[-1].startswith("q: quit")


def test_what_counts_is_seen_in_80_by_24() -> None:
    text = "\n".join(lines := drawn(big_fleet(100, 10), 80, 24))
    assert "12346 tokens/s" in text
    assert "<0.1 jobs/s" in text, "few is not none"
    assert "8 x NVIDIA H100" in text
    rows = [line for line in lines if "/worker-" in line or "64/64" in line]
    assert "ejected" in rows[0], "trouble comes first"
    assert "64/64" in rows[1], "then those at work"
    assert "1234" in rows[1]
    assert "12 s" in rows[1]
    assert re.search(r"llama-\S*…\S*q4_k_m", text), "both ends of a long name are seen"
    assert re.search(r"… \d{3} more", text)
    assert "interactive" in text
    assert "1 min 15 s" in text


def test_a_wide_terminal_shows_whole_names() -> None:
    assert LONG_MODEL in "\n".join(drawn(big_fleet(1, 1), 220, 50))


def test_rows_are_shared_so_that_no_section_is_lost() -> None:
    assert share([100, 1000, 1], 21) == [7, 7, 1]
    assert share([1, 1, 0], 50) == [1, 1, 0]
    assert all(rows >= 0 for rows in share([5, 5, 5], 3))
    assert sum(share([50, 50, 50], 40)) == 40 - 6


def test_names_keep_both_ends() -> None:
    assert shortened("abcdefghij", 7) == "abc…hij"
    assert shortened("abc", 3) == "abc"
    assert [len(shortened("abcdefghij", width)) for width in range(12)] == [*range(11), 10]


def test_devices_of_one_kind_are_one() -> None:
    card = Device(kind="cuda", name="A", memory_total_bytes=2 * GIB, memory_free_bytes=GIB)
    assert devices([card, card, Device(kind="cpu")]) == "2 x A 2.0 GiB of 4.0 GiB used, cpu"


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server(word_s=0.05) as running:
        yield running


@pytest.fixture
def working(person: Person, tmp_path: Path, server: RunningServer) -> Iterator[RunningQueen]:
    """Return the queen of the person's own machine, with a server in her inventory."""
    inventory = write_inventory(tmp_path, f"Worker attic url={server.url} model={LONG_MODEL} slots=1")
    with running_queen("--no-hive", "--inventory", inventory, home=person.home) as queen:
        wait_until(lambda: queen.status().hives[0].state == "ready", "the server to be known")
        yield queen


def write_inventory(folder: Path, worker: str) -> str:
    """Write an inventory with one server, and return its folder."""
    lines = [f"IgnoreUnknown {IGNORE_UNKNOWN}", "Host shed", "    HostName 127.0.0.1", "    HivePort none"]
    (folder / "hives.conf").write_text("\n".join([*lines, f"    {worker}", ""]))
    return str(folder)


class Screen:
    """`rbee` on a pseudo terminal of its own."""

    def __init__(self, person: Person, *words: str, columns: int = 80, lines: int = 24) -> None:
        self._master, slave = pty.openpty()
        self._slave = slave
        self.resize(columns, lines)
        self.modes = termios.tcgetattr(slave)
        kept = ("COLUMNS", "LINES")
        env = {name: value for name, value in person.env(TERM="xterm-256color").items() if name not in kept}
        self.process = subprocess.Popen(
            person.command(*words), stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self._shown = b""
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def shown(self) -> str:
        """Everything that was written, escape sequences and all."""
        return self._shown.decode(errors="replace")

    def picture(self) -> list[str]:
        """Return the lines of the last whole picture."""
        pictures = self.shown.split("\x1b[H")
        for picture in reversed(pictures):
            if "q: quit" in picture:
                return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", picture).replace("\r", "").rstrip("\n").split("\n")
        return []

    def until(self, text: str) -> None:
        """Wait until a picture shows a text."""
        wait_until(
            lambda: any(text in line for line in self.picture()), f"{text!r} on the screen: {self.shown[-3000:]}"
        )

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def ended(self) -> int:
        """Wait for its end; the terminal must be as it was."""
        code = self.process.wait(HANG_GUARD_S)
        wait_until(lambda: "\x1b[?1049l" in self.shown, "the old screen to come back")
        assert self.shown.rindex("\x1b[?25h") > self.shown.rindex("\x1b[?25l"), "the cursor is seen"
        assert termios.tcgetattr(self._slave)[:4] == self.modes[:4]
        assert "Traceback" not in self.shown
        return code

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        os.close(self._slave)
        os.close(self._master)

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 65536):
                self._shown += data


@contextlib.contextmanager
def on_a_screen(person: Person, *words: str) -> Iterator[Screen]:
    screen = Screen(person, *words)
    try:
        yield screen
    finally:
        screen.close()


def test_the_screen_follows_the_work_and_the_size_until_q(working: RunningQueen, person: Person) -> None:
    body = {"model": LONG_MODEL, "stream": True, "messages": [{"role": "user", "content": "word " * 400}]}
    with on_a_screen(person, "top", "--interval", "0.2") as screen:
        screen.until("0/1")
        answer = working.client.send("POST", "/v1/chat/completions", body)
        screen.until("1/1")
        wait_until(lambda: re.search(r"[1-9]\S* tokens/s", "\n".join(screen.picture())), "tokens to be counted")
        assert LONG_MODEL not in "\n".join(screen.picture())
        assert max(map(len, screen.picture())) <= 80
        screen.resize(200, 50)
        screen.until(LONG_MODEL)
        answer.close()
        screen.until("0/1")
        screen.type(b"q")
        assert screen.ended() == 0


def test_ctrl_c_and_sigterm_give_the_terminal_back(working: RunningQueen, person: Person) -> None:
    with on_a_screen(person, "top") as screen:
        screen.until("in flight")
        screen.type(b"\x03")
        assert screen.ended() == 130
    with on_a_screen(person, "top") as screen:
        screen.until("in flight")
        screen.process.send_signal(signal.SIGTERM)
        assert screen.ended() == 143


def test_ctrl_z_gives_the_screen_back_until_it_goes_on(working: RunningQueen, person: Person) -> None:
    with on_a_screen(person, "top", "--interval", "0.2") as screen:
        screen.until("in flight")
        screen.type(b"\x1a")
        wait_until(lambda: stopped(screen.process.pid), "it to stop")
        wait_until(lambda: screen.shown.endswith("\x1b[?25h") or "\x1b[?1049l" in screen.shown, "the old screen")
        seen = len(screen.shown)
        screen.process.send_signal(signal.SIGCONT)
        wait_until(lambda: "q: quit" in screen.shown[seen:], "it to draw again")
        screen.type(b"q")
        assert screen.ended() == 0


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_it_says_that_the_queen_is_away_and_goes_on_when_she_is_back(
    person: Person, tmp_path: Path, server: RunningServer
) -> None:
    inventory = write_inventory(tmp_path, f"Worker attic url={server.url} model=honey")
    words = ("--no-hive", "--inventory", inventory)
    with contextlib.ExitStack() as stack:
        with running_queen(*words, home=person.home):
            screen = stack.enter_context(on_a_screen(person, "top", "--interval", "0.2"))
            screen.until("shed/attic")
        screen.until("The queen is away for")
        screen.until("shed/attic")
        with running_queen(*words, home=person.home):
            wait_until(lambda: not any("is away" in line for line in screen.picture()), "her to be back")
            screen.until("shed/attic")
            screen.type(b"q")
            assert screen.ended() == 0


def test_once_json_and_lines_need_no_terminal(working: RunningQueen, person: Person) -> None:
    once = person.rbee("top", "--once")
    assert (once.returncode, once.stderr) == (0, "")
    assert "shed/attic" in once.stdout
    assert LONG_MODEL in once.stdout
    assert "\x1b" not in once.stdout
    assert not any(line.endswith(" ") for line in once.stdout.splitlines())
    one = json.loads(person.rbee("top", "--json").stdout)
    assert one["hives"][0]["workers"][0]["id"] == "shed/attic"
    for words, mark in ((("--json", "--follow"), b'{"version"'), ((), b"rbee ")):
        process = person.start("top", *words, "--interval", "0.1")
        assert process.stdout is not None
        found = 0
        while found < 3:
            found += process.stdout.readline().startswith(mark)
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG_GUARD_S) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""
        process.stdout.close()
        process.stderr.close()


def test_a_reader_that_has_enough_ends_it(working: RunningQueen, person: Person) -> None:
    process = person.start("top", "--json", "--follow", "--interval", "0.1")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(HANG_GUARD_S) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_without_a_queen_or_with_words_that_make_no_sense_it_says_so(person: Person) -> None:
    none = person.rbee("top")
    assert (none.returncode, none.stdout) == (3, "")
    assert "rbee queen start" in none.stderr
    assert person.rbee("top", "--follow").returncode == 2
    assert person.rbee("top", "--interval", "0").returncode == 2


def test_the_lines_say_on_stderr_that_the_queen_went(working: RunningQueen, person: Person) -> None:
    process = person.start("top", "--json", "--follow", "--interval", "0.1")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    working.process.terminate()
    assert process.stderr.readline().startswith(b"The queen is away: ")
    process.send_signal(signal.SIGINT)
    assert process.wait(HANG_GUARD_S) == 130
    process.stdout.close()
    process.stderr.close()
