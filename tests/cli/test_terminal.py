"""What is different on a terminal: spinner, colours, and no control characters from outside."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import threading
from collections.abc import Callable, Iterator

from cli_fake_queen import END, Answering, FakeQueen, chunk, whole
from cli_rig import HANG_GUARD_S, Person

from rbee.cli import terminal
from rbee.http.server import Request

ESCAPE = "\x1b["
StartQueen = Callable[[Answering], FakeQueen]


def on_a_terminal(
    person: Person, *words: str, until: Callable[[str], None] = lambda shown: None, **environment: str
) -> str:
    """Run `rbee` in a pseudo terminal and return what a person sees on it, escape sequences and all."""
    master, slave = pty.openpty()
    env = {"TERM": "xterm-256color", "COLUMNS": "100", **person.env(**environment)}
    env = {name: value for name, value in env.items() if name != "NO_COLOR" or name in environment}
    with subprocess.Popen(person.command(*words), stdin=slave, stdout=slave, stderr=slave, env=env) as process:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):
            while data := os.read(master, 65536):
                shown += data
                until(shown.decode(errors="replace"))
        process.wait(HANG_GUARD_S)
    os.close(master)
    return shown.decode()


def test_a_wait_shows_a_spinner_that_says_what_it_waits_for(person: Person, fake_queen: StartQueen) -> None:
    spinning = threading.Event()

    def answer(request: Request) -> Iterator[bytes]:
        assert spinning.wait(HANG_GUARD_S)
        yield chunk("Hello")
        yield END

    def look(shown: str) -> None:
        if "loading my-model" in shown:
            spinning.set()

    shown = on_a_terminal(person, "infer", "-m", "my-model", "-p", "Hi", until=look, RBEE_URL=fake_queen(answer).url)
    before, _, after = shown.partition("Hello")
    assert "loading my-model" in before
    assert "\x1b[?25h" in before, "the cursor is shown again before the answer"
    assert "loading" not in after


def test_a_prompt_that_is_answered_at_once_shows_no_spinner(person: Person, fake_queen: StartQueen) -> None:
    shown = on_a_terminal(person, "infer", "-q", "-p", "Hi", RBEE_URL=fake_queen(whole("Hello")).url)
    assert shown == "Hello\r\n"


def test_what_a_model_says_cannot_steer_the_terminal(person: Person, fake_queen: StartQueen) -> None:
    evil = "\x1b]52;c;cm0gLXJm\x07\x1b[2J\x9b1mred\ttab\nline"
    shown = on_a_terminal(person, "infer", "-q", "-p", "Hi", RBEE_URL=fake_queen(whole(evil)).url)
    assert not re.search(r"[\x1b\x07\x9b]", shown)
    assert "red" in shown
    piped = person.rbee("infer", "-q", "-p", "Hi", RBEE_URL=fake_queen(whole(evil)).url)
    assert piped.stdout == evil + "\n", "a pipe gets the bytes as they are"


def test_no_prompt_on_a_terminal_does_not_wait_for_one(person: Person) -> None:
    assert "There is no prompt" in on_a_terminal(person, "infer")


def test_colours_are_for_terminals_that_want_them(person: Person) -> None:
    person.rbee("worker", "spawn", "-m", "echo")
    assert f"{ESCAPE}32m" in on_a_terminal(person, "worker", "list")
    assert "\x1b[32m" not in on_a_terminal(person, "worker", "list", NO_COLOR="1")
    assert ESCAPE not in person.rbee("worker", "list").stdout


def test_a_table_in_a_pipe_has_one_line_a_row_however_long(person: Person) -> None:
    lines = person.rbee("plugin", "list").stdout.splitlines()
    assert len(lines) == 1 + len(person.rbee("plugin", "list", "--json").stdout.split('"name":')) - 1
    assert not any(line.endswith(" ") for line in lines)


def test_the_cold_start_says_what_it_does(person: Person) -> None:
    shown = on_a_terminal(person, "infer", "-p", "Hello")
    assert "starting the queen" in shown
    assert "tokens/s" in shown


def test_sizes_and_ages() -> None:
    assert [terminal.size(n) for n in (0, 1023, 1024, 3_101_184, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 MiB",
        "5.0 TiB",
    ]
    assert [terminal.age(s) for s in (0, 59, 61, 3700, 90000)] == ["0 s", "59 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"]
