"""What systemd knows of the declared workers' units; the one caller of systemctl and journalctl, and it only reads."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rbee.errors import SetupProblem, TimedOut

LIMIT_S = 5.0
STARTS = "/run/systemd/units"
"""Here systemd keeps a link for each running unit, with a new target at each start (systemd.exec(5), INVOCATION_ID)."""
PROPERTIES = (
    "Id",
    "LoadState",
    "ActiveState",
    "SubState",
    "Result",
    "ExecMainCode",
    "ExecMainStatus",
    "ExecMainStartTimestampMonotonic",
    "MainPID",
    "NRestarts",
    "StatusText",
)
EXIT_CODE, KILLED, DUMPED = "1", "2", "3"
"""ExecMainCode, as waitid(2) has it."""


@dataclass(frozen=True)
class Unit:
    """One unit as `systemctl show` tells it; every value is systemd's own word (systemd.service(5))."""

    load: str = ""
    active: str = ""
    sub: str = ""
    result: str = ""
    main_code: str = ""
    main_status: str = ""
    started_us: int = 0
    """When the last run began, on CLOCK_MONOTONIC in microseconds."""
    pid: int = 0
    restarts: int = 0
    status_text: str = ""

    @property
    def runs(self) -> bool:
        """Return True while the worker's process is there."""
        return self.pid > 0 and self.active in ("active", "activating", "deactivating", "reloading")


def service(worker: str) -> str:
    """Return the name of a worker's service."""
    return f"rbee-worker@{worker}.service"


def listener(worker: str) -> str:
    """Return the name of the unit that holds a worker's listening socket."""
    return f"rbee-worker@{worker}.socket"


def start_of(unit: str, folder: str = STARTS) -> str:
    """Return what names the present start of a unit, empty when it does not run; it costs no process."""
    with contextlib.suppress(OSError):
        return os.readlink(f"{folder}/invocation:{unit}")
    return ""


def show(units: Sequence[str]) -> dict[str, Unit]:
    """Return the units by name. Raises: SetupProblem, TimedOut when systemd does not answer within 5 s."""
    output = _run(["systemctl", "show", "--no-pager", f"--property={','.join(PROPERTIES)}", "--", *units])
    found = (_fields(block.splitlines()) for block in output.split("\n\n") if block.strip())
    return {fields.get("Id", ""): _unit(fields) for fields in found}


def journal(unit: str, lines: int, *, own: bool = False) -> str:
    """Return the end of a unit's log; `own` leaves out what systemd says about it. Raises: SetupProblem, TimedOut."""
    which = f"_SYSTEMD_UNIT={unit}" if own else f"--unit={unit}"
    return _run(["journalctl", "--no-pager", "--quiet", "--output=cat", f"--lines={lines}", which])


def outcome(unit: Unit) -> str:
    """Say in words how the last run of a unit ended (systemd.service(5), $SERVICE_RESULT)."""
    if unit.main_code == EXIT_CODE and unit.result in ("exit-code", "start-limit-hit"):
        how = f"exit code {unit.main_status}"
    elif unit.main_code in (KILLED, DUMPED) and unit.result in ("signal", "core-dump", "start-limit-hit"):
        how = f"killed by signal {unit.main_status}"
    else:
        how = ""
    words = {
        "oom-kill": "the kernel ended it because memory ran out (oom-kill)",
        "timeout": "it did not start or end within its limit (timeout)",
        "watchdog": "it gave no sign of life within its limit (watchdog)",
        "protocol": "it ended before it was ready (protocol)",
        "resources": "systemd could not start it (resources)",
        "start-limit-hit": f"it failed too often in a row (start-limit-hit{', ' + how if how else ''})",
    }
    return words.get(unit.result) or how or unit.result


def _run(command: Sequence[str]) -> str:
    """Raises: SetupProblem, TimedOut."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise TimedOut(f"{command[0]} did not answer within {LIMIT_S:g} s") from None
    except OSError as problem:
        raise SetupProblem(f"{command[0]} cannot be run ({problem.strerror})") from None
    if done.returncode:
        said = " ".join(done.stderr.split())[:300] or f"exit code {done.returncode}"
        raise SetupProblem(f"{command[0]} does not answer ({said})")
    return done.stdout


def _fields(lines: Iterable[str]) -> dict[str, str]:
    pairs = (line.partition("=") for line in lines)
    return {name: value for name, equals, value in pairs if equals}


def _unit(fields: dict[str, str]) -> Unit:
    return Unit(
        load=fields.get("LoadState", ""),
        active=fields.get("ActiveState", ""),
        sub=fields.get("SubState", ""),
        result=fields.get("Result", ""),
        main_code=fields.get("ExecMainCode", ""),
        main_status=fields.get("ExecMainStatus", ""),
        started_us=_number(fields, "ExecMainStartTimestampMonotonic"),
        pid=_number(fields, "MainPID"),
        restarts=_number(fields, "NRestarts"),
        status_text=fields.get("StatusText", ""),
    )


def _number(fields: dict[str, str], name: str) -> int:
    """Return a number, 0 where systemd has none ("[not set]"; 2^64-1 where nothing is accounted)."""
    text = fields.get(name, "")
    number = int(text) if text.isascii() and text.isdigit() else 0
    return number if number < 2**63 else 0
