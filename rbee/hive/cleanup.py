"""Ends and deletes what a killed hive left behind."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from rbee.hive import observe
from rbee.hive.launch import MARK, ProcessRecord

log = logging.getLogger("rbee.hive")

ENDED_WITHIN_S = 5.0


def sweep(folder: Path) -> None:
    """End the workers that a predecessor's records name, and empty the folder of its files.

    Call it only while no other hive of this folder runs. A process is ended when its number, its start time and its
    command line are those of the record, or when it is in the session of that number and carries the worker's mark.
    """
    orphans = {pid for record in _records(folder) for pid in _left_of(record)}
    for pid in orphans:
        log.warning("ending process %d, left by a hive that was killed", pid)
        _kill(pid)
    _wait_until_gone(orphans)
    for path in folder.iterdir():
        if path.is_file() or path.is_socket() or path.is_symlink():
            path.unlink(missing_ok=True)


def _records(folder: Path) -> Iterator[ProcessRecord]:
    for path in folder.glob("[!.]*.json"):
        if path.name.endswith(".spec.json"):
            continue
        try:
            yield msgspec.json.decode(path.read_bytes(), type=ProcessRecord)
        except (OSError, msgspec.DecodeError):
            log.warning("%s cannot be read and is deleted", path)


def _left_of(record: ProcessRecord) -> Iterator[int]:
    started = observe.start_ticks(record.pid)
    if started and started == record.start_ticks and observe.command_line(record.pid) == record.command:
        yield record.pid
    # What the worker had started lives on in its session when the worker itself is gone.
    for pid in observe.session_members(record.pid):
        if pid != record.pid and f"{MARK}={record.name}" in observe.environment(pid):
            yield pid


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError) as problem:
        log.warning("process %d cannot be ended: %s", pid, problem)


def _wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + ENDED_WITHIN_S
    while any(observe.start_ticks(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
