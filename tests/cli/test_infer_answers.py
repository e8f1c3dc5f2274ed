"""What `rbee infer` makes of what a queen answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest
from cli_fake_queen import END, USAGE, Answering, FakeQueen, chunk, refused, whole
from cli_rig import HANG_GUARD_S, Person

from rbee.errors import AccessDenied, Busy, LoadFailed, NotSupported, RbeeError, TimedOut, UnknownModel, WorkerLost
from rbee.http.server import Request

StartQueen = Callable[[Answering], FakeQueen]


def test_the_answer_goes_to_stdout_and_the_figures_to_stderr(person: Person, fake_queen: StartQueen) -> None:
    queen = fake_queen(whole("Hello", " you"))
    done = person.rbee("infer", "-p", "Hi", RBEE_URL=queen.url)
    assert (done.returncode, done.stdout) == (0, "Hello you\n")
    assert "2 tokens" in done.stderr
    assert "first token after" in done.stderr


def test_quiet_says_the_answer_only(person: Person, fake_queen: StartQueen) -> None:
    done = person.rbee("infer", "-q", "-p", "Hi", RBEE_URL=fake_queen(whole("Hello\n")).url)
    assert (done.stdout, done.stderr) == ("Hello\n", "")


def test_every_option_reaches_the_queen(person: Person, fake_queen: StartQueen) -> None:
    queen = fake_queen(whole("x"))
    wanted = "infer -m m -a gaming-pc --system Brief. --max-tokens 7 --temperature 0.5 --seed 9 -p Hi"
    person.rbee("--queen", f"{queen.url}/v1", *wanted.split(), RBEE_API_KEY="rbee_sk_x")
    assert queen.asked() == {
        "model": "m",
        "messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 9,
    }
    headers = queen.requests[0].headers
    assert headers["x-rbee-hive"] == "gaming-pc"
    assert headers["authorization"] == "Bearer rbee_sk_x"


def test_the_model_comes_from_the_environment(person: Person, fake_queen: StartQueen) -> None:
    queen = fake_queen(whole("x"))
    person.rbee("infer", "-p", "Hi", RBEE_URL=queen.url, RBEE_MODEL="mine")
    assert queen.asked()["model"] == "mine"


def test_standard_input_is_the_prompt(person: Person, fake_queen: StartQueen) -> None:
    queen = fake_queen(whole("x"))
    person.rbee("infer", stdin="Zwei Zeilen,\nÄpfel\n", RBEE_URL=queen.url)
    assert queen.asked()["messages"] == [{"role": "user", "content": "Zwei Zeilen,\nÄpfel"}]


def test_json_is_one_object(person: Person, fake_queen: StartQueen) -> None:
    done = person.rbee("infer", "--json", "-q", "-m", "m", "-p", "Hi", RBEE_URL=fake_queen(whole("Hello", " you")).url)
    answer = json.loads(done.stdout)
    assert (answer["text"], answer["model"], answer["usage"]) == ("Hello you", "m", USAGE)
    assert (answer["job"], answer["worker"]) == ("job_1", "here/w1")
    assert set(answer["timings"]) == {"time_to_first_token_s", "total_s", "tokens_per_second"}


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (UnknownModel("lama", ["llama"], ["llama"]), 4, "Did you mean 'llama'?"),
        (NotSupported("This model cannot chat"), 2, "This model cannot chat"),
        (AccessDenied("A key is needed", hint="rbee key create NAME"), 5, "  try: rbee key create NAME"),
        (Busy("The queue is full"), 6, "The queue is full"),
        (WorkerLost("The worker died"), 3, "The worker died"),
        (TimedOut("No answer came"), 3, "No answer came"),
        (LoadFailed("Out of memory"), 1, "Out of memory"),
    ],
)
def test_an_error_of_the_queen_is_a_message_and_an_exit_code(
    person: Person, fake_queen: StartQueen, error: RbeeError, code: int, shown: str
) -> None:
    done = person.rbee("infer", "-p", "Hi", RBEE_URL=fake_queen(refused(error)).url)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("rbee: ")
    assert shown in done.stderr


def test_an_error_in_the_stream_ends_the_answer_with_its_code(person: Person, fake_queen: StartQueen) -> None:
    def answer(request: Request) -> Iterator[bytes]:
        yield chunk("Hel")
        yield b'data: {"error": {"message": "The worker died", "type": "server_error", "code": "worker_lost"}}\n\n'

    done = person.rbee("infer", "-p", "Hi", RBEE_URL=fake_queen(answer).url)
    assert (done.returncode, done.stdout) == (3, "Hel")
    assert "rbee: The worker died" in done.stderr


def test_an_answer_that_stops_without_its_end_is_no_success(person: Person, fake_queen: StartQueen) -> None:
    done = person.rbee("infer", "-p", "Hi", RBEE_URL=fake_queen(lambda request: iter([chunk("Hel")])).url)
    assert done.returncode == 3
    assert "cut off" in done.stderr


def test_nothing_at_the_address(person: Person) -> None:
    done = person.rbee("infer", "-p", "Hi", RBEE_URL="http://127.0.0.1:1")
    assert done.returncode == 3
    assert "Nothing answers at http://127.0.0.1:1" in done.stderr


def test_an_address_that_is_none(person: Person) -> None:
    assert person.rbee("infer", "-p", "Hi", RBEE_URL="gaming-pc").returncode == 2


def test_ctrl_c_cancels_the_job_and_ends_with_130(person: Person, fake_queen: StartQueen) -> None:
    going_on = threading.Event()

    def answer(request: Request) -> Iterator[bytes]:
        while True:
            yield chunk("token ")
            going_on.wait(0.02)

    queen = fake_queen(answer)
    running = person.start("infer", "-p", "Hi", RBEE_URL=queen.url)
    assert running.stdout is not None
    assert running.stdout.read(5) == b"token"
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=HANG_GUARD_S)
    assert running.returncode == 130
    assert b"Traceback" not in stderr
    assert queen.cancelled.wait(HANG_GUARD_S)


def test_a_reader_that_stops_early_ends_it_quietly(person: Person, fake_queen: StartQueen) -> None:
    def answer(request: Request) -> Iterator[bytes]:
        while not queen.cancelled.is_set():
            yield chunk("a line\n" * 500)

    queen = fake_queen(answer)
    running = person.start("infer", "-p", "Hi", RBEE_URL=queen.url)
    assert running.stdout is not None
    running.stdout.readline()
    running.stdout.close()
    assert running.stderr is not None
    assert running.stderr.read() == b""
    assert running.wait(HANG_GUARD_S) == 0
    running.stderr.close()
    assert queen.cancelled.wait(HANG_GUARD_S)


def test_tokens_come_out_as_they_come_in(person: Person, fake_queen: StartQueen) -> None:
    seen = threading.Event()

    def answer(request: Request) -> Iterator[bytes]:
        yield chunk("first")
        assert seen.wait(HANG_GUARD_S)
        yield chunk(" second")
        yield END

    running = person.start("infer", "-p", "Hi", RBEE_URL=fake_queen(answer).url)
    assert running.stdout is not None
    assert os.read(running.stdout.fileno(), 100) == b"first"
    seen.set()
    assert running.communicate(timeout=HANG_GUARD_S)[0] == b" second\n"


@pytest.mark.parametrize("words", [[], ["-p", ""], ["-p", "  "]])
def test_no_prompt_is_a_usage_error_that_teaches(person: Person, words: list[str]) -> None:
    done = person.rbee("infer", *words)
    assert done.returncode == 2
    assert 'echo "…" | rbee infer' in done.stderr
    assert "try: rbee infer --help" in done.stderr


@pytest.mark.parametrize(
    "words",
    [["--temperature", "9"], ["--max-tokens", "-1"], ["--seed", str(2**63)], ["--temprature", "1"], ["--seed", "x"]],
)
def test_a_wrong_option_is_refused_before_anything_starts(person: Person, words: list[str]) -> None:
    done = person.rbee("infer", "-p", "Hi", *words)
    assert done.returncode == 2
    assert words[0] in done.stderr
    assert not (person.home / "state").exists()


def test_input_that_is_no_text_is_refused(person: Person) -> None:
    done = person.rbee("infer", stdin=b"ab\xff\xfe")
    assert done.returncode == 2
    assert "UTF-8 (byte 2)" in done.stderr


def test_endless_input_is_refused_and_not_read_on(person: Person) -> None:
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as endless:
        done = subprocess.run(
            person.command("infer"), stdin=endless.stdout, capture_output=True, env=person.env(), timeout=HANG_GUARD_S,
            check=False,
        )  # fmt: skip
        endless.kill()
    assert done.returncode == 2
    assert b"4194304 bytes" in done.stderr


def test_a_file_of_the_current_folder_does_not_stand_in_for_a_module(person: Person, fake_queen: StartQueen) -> None:
    (person.folder / "msgspec.py").write_text("raise SystemExit('shadowed')")
    done = person.rbee("queen", "start")
    assert done.returncode == 0, done.stderr
