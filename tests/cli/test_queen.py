"""`rbee queen`: started once, found, replaced, stopped, whatever happened before."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

from cli_rig import HANG_GUARD_S, Person, wait_until


def record(person: Person) -> dict[str, object]:
    read: dict[str, object] = json.loads((person.home / "state" / "queen.json").read_text())
    return read


def pid_of(person: Person) -> int:
    pid = record(person)["pid"]
    assert isinstance(pid, int)
    return pid


def change_record(person: Person, **fields: object) -> None:
    (person.home / "state" / "queen.json").write_text(json.dumps(record(person) | fields))


def test_start_status_stop(person: Person) -> None:
    before = person.rbee("queen", "status")
    assert (before.returncode, before.stdout) == (3, "")
    assert "rbee queen start" in before.stderr

    started = person.rbee("queen", "start")
    assert started.returncode == 0, started.stderr
    assert started.stdout == f"http://127.0.0.1:{record(person)['port']}/v1\n"

    again = person.rbee("queen", "start")
    assert (again.returncode, again.stdout) == (0, started.stdout)
    assert "runs already" in again.stderr

    status = person.rbee("queen", "status")
    assert status.returncode == 0
    assert f"process {record(person)['pid']}" in status.stdout
    assert json.loads(person.rbee("queen", "status", "--json").stdout)["pid"] == record(person)["pid"]

    stopped = person.rbee("queen", "stop")
    assert stopped.returncode == 0, stopped.stderr
    assert not person.processes()
    assert not (person.home / "state" / "queen.json").exists()
    assert person.rbee("queen", "stop").returncode == 0
    assert person.rbee("queen", "status").returncode == 3


def test_the_record_and_the_log_are_for_their_owner_only(person: Person) -> None:
    person.rbee("queen", "start")
    for name in ("queen.json", "queen.log"):
        assert (person.home / "state" / name).stat().st_mode & 0o077 == 0
    assert "listening on" in person.rbee("queen", "logs").stdout
    assert person.rbee("queen", "logs", "-n", "0").stdout == ""


def test_logs_follow_what_comes(person: Person) -> None:
    person.rbee("queen", "start")
    following = person.start("queen", "logs", "-f", "-n", "0")
    assert following.stdout is not None
    line: list[bytes] = []
    reader = threading.Thread(target=lambda: line.append(following.stdout.readline()))  # type: ignore[union-attr]
    reader.start()

    def write() -> bool:
        # Written again and again, because the reader may not have come to the end of the file yet.
        with (person.home / "state" / "queen.log").open("a") as log:
            log.write("a new line\n")
        return bool(line)

    wait_until(write, "the new line is shown")
    reader.join()
    assert line == [b"a new line\n"]
    following.send_signal(signal.SIGINT)
    following.communicate(timeout=HANG_GUARD_S)
    assert following.returncode == 130


def test_of_several_starts_at_once_one_starts_and_all_report_it(person: Person) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: person.rbee("queen", "start"), range(4)))
    assert [one.returncode for one in done] == [0] * 4
    assert len({one.stdout for one in done}) == 1
    assert sum("runs already" in one.stderr for one in done) == 3
    masters = [pid for pid, command in person.processes().items() if "rbee.queen run" in command]
    assert pid_of(person) in masters


def test_a_port_in_use_is_said_with_what_to_try(person: Person) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = person.rbee("queen", "start", "--port", str(port))
    assert done.returncode == 1
    assert f"Port {port} on 127.0.0.1 is in use by another program" in done.stderr
    assert "try: " in done.stderr
    assert person.rbee("queen", "status").returncode == 3


def test_another_port_than_the_running_queens_is_refused(person: Person) -> None:
    person.rbee("queen", "start")
    done = person.rbee("queen", "start", "--port", "1")
    assert done.returncode == 1
    assert f"process {record(person)['pid']}" in done.stderr


def test_what_a_killed_queen_left_is_no_queen(person: Person) -> None:
    person.rbee("queen", "start")
    os.kill(pid_of(person), signal.SIGKILL)
    wait_until(lambda: not person.processes(), "her hive ends with her")
    assert (person.home / "state" / "queen.json").exists()
    assert person.rbee("queen", "status").returncode == 3
    assert "No queen is running" in person.rbee("queen", "stop").stderr
    assert not (person.home / "state" / "queen.json").exists()
    assert person.rbee("queen", "start").returncode == 0


def test_a_later_process_of_the_same_number_is_no_queen_and_is_left_alone(person: Person) -> None:
    person.rbee("queen", "start")
    kept = record(person)
    change_record(person, pid=os.getpid())
    assert person.rbee("queen", "status").returncode == 3
    change_record(person, **kept)
    assert person.rbee("queen", "stop").returncode == 0


def test_a_record_that_is_damaged_is_no_queen(person: Person) -> None:
    state = person.home / "state"
    state.mkdir(parents=True)
    (state / "queen.json").write_text('{"pid": "x"')
    assert person.rbee("queen", "status").returncode == 3
    assert person.rbee("queen", "start").returncode == 0


def test_an_older_queen_is_drained_and_replaced_at_the_same_port(person: Person) -> None:
    person.rbee("queen", "start")
    old = record(person)
    change_record(person, version="0.0.9")
    done = person.rbee("infer", "-q", "-m", "echo", "-p", "hello")
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    assert record(person)["pid"] != old["pid"]
    assert record(person)["port"] == old["port"]


def test_a_newer_queen_is_used_as_it_is(person: Person) -> None:
    person.rbee("queen", "start")
    change_record(person, version="99.0.0")
    pid = pid_of(person)
    assert person.rbee("infer", "-q", "-m", "echo", "-p", "hello").returncode == 0
    assert pid_of(person) == pid


def test_a_queen_that_refuses_to_shut_down_is_ended_all_the_same(person: Person) -> None:
    person.rbee("queen", "start")
    change_record(person, token="not the token")
    assert person.rbee("queen", "stop").returncode == 0
    assert not person.processes()


def test_run_in_the_foreground_ends_with_ctrl_c(person: Person) -> None:
    running = person.start("queen", "run")
    wait_until((person.home / "state" / "queen.json").exists, "the queen listens")
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=HANG_GUARD_S)
    assert running.returncode == 0
    wait_until(lambda: not person.processes(), "all end")


def test_a_state_folder_that_cannot_be_made(person: Person) -> None:
    person.home.rmdir()
    person.home.write_text("a file")
    try:
        done = person.rbee("queen", "start")
        assert done.returncode == 1
        assert str(person.home) in done.stderr
    finally:
        person.home.unlink()
        person.home.mkdir()
