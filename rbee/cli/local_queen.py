"""The queen of this machine: found by `queen.json`, started in the background, stopped in good order."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import msgspec

from rbee import __version__
from rbee.cli.processes import command_line, start_time
from rbee.cli.queen_log import last_words, rotate
from rbee.client import Client
from rbee.errors import RbeeError, SetupProblem, TimedOut, Unreachable
from rbee.paths import private, state_dir
from rbee.wire.fleet import HiveView, QueenRecord

START_TIMEOUT_S = 30.0
HIVE_TIMEOUT_S = 20.0
DRAIN_TIMEOUT_S = 30.0
TERM_TIMEOUT_S = 15.0
KILL_TIMEOUT_S = 5.0
LOCK_TIMEOUT_S = 90.0
CLOCK_SLACK_S = 10.0

SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""A file of the folder that rbee is called in must not stand in for a module of rbee, in no process that it starts."""

Step = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What `rbee queen start` was asked for; None takes the queen's own default."""

    port: int | None = None
    host: str | None = None
    hive_port: int | None = None
    inventory: str | None = None
    processes: int | None = None
    state: str | None = None
    state_password_file: str | None = None
    advertise: str | None = None
    log_format: str | None = None
    otlp_endpoint: str | None = None
    log_jobs: bool = False

    @classmethod
    def from_environment(cls) -> Options:
        """Return the options that RBEE_QUEEN_PORT and RBEE_HIVE_PORT name, for a queen that starts by itself."""
        return cls(port=_port("RBEE_QUEEN_PORT"), hive_port=_port("RBEE_HIVE_PORT"))

    def arguments(self) -> list[str]:
        """Return the arguments of `python -m rbee.queen run`."""
        given = {
            "--port": self.port,
            "--host": self.host,
            "--hive-port": self.hive_port,
            "--inventory": self.inventory,
            "--processes": self.processes,
            "--state": self.state,
            "--state-password-file": self.state_password_file,
            "--advertise": self.advertise,
            "--log-format": self.log_format,
            "--otlp-endpoint": self.otlp_endpoint,
        }
        words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
        return [*words, "--log-jobs"] if self.log_jobs else words


def record_path() -> Path:
    """Return where a running queen says how it is found."""
    return state_dir() / "queen.json"


def log_path() -> Path:
    """Return where a queen that was started in the background writes."""
    return state_dir() / "queen.log"


def url_of(record: QueenRecord) -> str:
    """Return the address at which a queen of this machine is dialled."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(record.host, record.host)
    return f"http://[{host}]:{record.port}" if ":" in host else f"http://{host}:{record.port}"


def find(path: Path | None = None) -> QueenRecord | None:
    """Return the record of the running queen, or None; what a killed queen left behind is no queen."""
    try:
        record = msgspec.json.decode((path or record_path()).read_bytes(), type=QueenRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return record if is_queen(record.pid, record.started_at) else None


def is_queen(pid: int, started_at: float) -> bool:
    """Return True when `pid` is a queen that was started before `started_at`, not a later process of that number."""
    words = command_line(pid)
    if not any("rbee.queen" in word or "queen-rbee" in word for word in words):
        return False
    began = start_time(pid)
    return began is None or began <= started_at + CLOCK_SLACK_S


def older(version: str) -> bool:
    """Return True when `version` is older than this rbee."""
    return _numbers(version) < _numbers(__version__)


def ensure(step: Step) -> QueenRecord:
    """Return the running queen; start one when there is none, and replace one of an older version.

    Raises: SetupProblem with the queen's own last words when it does not start.
    """
    record = find()
    if record is not None and not older(record.version):
        return record
    return start(Options.from_environment(), step)[0]


def await_end(url: str) -> None:
    """Wait until a queen that does not answer has ended. Raises: Unreachable when it goes on without answering."""
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    while (record := find()) is not None and url_of(record) == url and not _answers(record):
        if time.monotonic() > deadline:
            raise Unreachable(
                f"The queen (process {record.pid}) runs, but does not answer at {url}",
                hint="rbee queen stop, then again",
            )
        time.sleep(0.05)


def start(options: Options, step: Step) -> tuple[QueenRecord, bool]:
    """Start a queen in the background; return its record, and False when one ran already.

    Of two that start at once, one starts it and both return it. Raises: SetupProblem.
    """
    with _lock():
        record = find()
        if record is not None and older(record.version):
            step(f"replacing the queen of version {record.version}")
            options = _as_before(options, record)
            stop(record, step)
            record = None
        if record is not None:
            _refuse_other(options, record)
            return record, False
        record_path().unlink(missing_ok=True)
        step("starting the queen")
        return _launch(options), True


def await_hive(record: QueenRecord, step: Step) -> bool:
    """Wait until this machine's hive has told the queen which engines it has; return False when it takes too long."""
    step("waiting for this machine's hive")
    deadline = time.monotonic() + HIVE_TIMEOUT_S
    with contextlib.closing(Client(url_of(record), token=record.token)) as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(RbeeError):
                known = client.get("/v1/hives", list[HiveView])
                # Hives of the inventory are dialled by https.
                if any(hive.engines and hive.url.startswith("http://") for hive in known):
                    return True
            time.sleep(0.02)
    return False


def stop(record: QueenRecord, step: Step) -> None:
    """Have a queen end its jobs and exit; one that does not is ended by signal. Raises: SetupProblem."""
    step("waiting for running jobs to end")
    with contextlib.suppress(RbeeError), contextlib.closing(Client(url_of(record), token=record.token)) as client:
        client.send("POST", "/v1/orchestrator/shutdown", timeout_s=5.0).close()
        if _gone(record, DRAIN_TIMEOUT_S):
            return _forget(record)
    for number, limit_s in ((signal.SIGTERM, TERM_TIMEOUT_S), (signal.SIGKILL, KILL_TIMEOUT_S)):
        if is_queen(record.pid, record.started_at):
            step(f"ending the queen (process {record.pid})")
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, number)
        if _gone(record, limit_s):
            return _forget(record)
    raise SetupProblem(f"The queen (process {record.pid}) does not end", hint=f"rbee doctor, or: ps -fp {record.pid}")


@contextlib.contextmanager
def starting_or_stopping() -> Iterator[QueenRecord | None]:
    """Hold the lock under which a queen is started and stopped; the value is the running one."""
    with _lock():
        record = find()
        if record is None:
            record_path().unlink(missing_ok=True)
        yield record


def spawn(
    arguments: Sequence[str], log: IO[bytes], *, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `python -m rbee.queen run` in a session of its own, so that Ctrl+C here is not for it."""
    return subprocess.Popen(
        [sys.executable, "-m", "rbee.queen", "run", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        cwd="/",
        env={**(os.environ if environment is None else environment), **SAFE_PATH},
    )


def wait_until_up(process: subprocess.Popen[bytes], path: Path, last_words: Callable[[], str]) -> QueenRecord:
    """Return the record of a queen that was just started, once it answers. Raises: SetupProblem."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            words = last_words() or f"it ended with code {process.returncode}"
            raise SetupProblem(f"The queen did not start: {words}", hint="rbee queen logs, or rbee doctor")
        record = find(path)
        if record is not None and record.pid == process.pid and _answers(record):
            return record
        time.sleep(0.02)
    process.terminate()
    raise TimedOut(f"The queen did not answer within {START_TIMEOUT_S:g} s of its start", hint="rbee queen logs")


def _launch(options: Options) -> QueenRecord:
    private(state_dir())
    rotate(log_path())
    descriptor = os.open(log_path(), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "ab") as log:
        begin = log.seek(0, os.SEEK_END)
        process = spawn(options.arguments(), log)

    def words() -> str:
        with log_path().open("rb") as file:
            file.seek(begin)
            return last_words(file.read(1_000_000).decode(errors="replace").splitlines())

    return wait_until_up(process, record_path(), words)


def _answers(record: QueenRecord) -> bool:
    with contextlib.closing(Client(url_of(record), timeout_s=2.0)) as client:
        try:
            client.send("GET", "/health").close()
        except RbeeError:
            return False
    return True


def _refuse_other(options: Options, record: QueenRecord) -> None:
    asked = {"port": options.port or None, "host": options.host}
    runs = {"port": record.port, "host": record.host}
    if any(value is not None and value != runs[name] for name, value in asked.items()):
        raise SetupProblem(
            f"A queen runs already at {url_of(record)} (process {record.pid})", hint="rbee queen stop first"
        )


def _as_before(options: Options, record: QueenRecord) -> Options:
    """Return the options with the address of the queen that is replaced, where no other was asked for."""
    host = record.host if options.host is None else options.host
    return replace(options, port=options.port or record.port, host=host)


def _gone(record: QueenRecord, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while is_queen(record.pid, record.started_at):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _forget(record: QueenRecord) -> None:
    """Remove the record of a queen that has ended, unless another one has written its own."""
    with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
        if msgspec.json.decode(record_path().read_bytes(), type=QueenRecord).pid == record.pid:
            record_path().unlink(missing_ok=True)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    folder = private(state_dir())
    descriptor = os.open(folder / "queen.lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimedOut(
                        "Another rbee is still starting or stopping the queen", hint="rbee queen status"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _port(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise SetupProblem(f"{variable} is {text!r}, which is no port", hint="a number from 0 to 65535")
    return int(text)
