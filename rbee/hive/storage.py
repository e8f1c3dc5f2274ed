"""A TinyDB storage that `kill -9`, a full disk or a second writer cannot break.

TinyDB's own overwrites the file in place and truncates it afterwards, so a process that is killed between the two
leaves a file that cannot be read.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import msgspec
from tinydb.storages import Storage

from rbee.errors import SetupProblem
from rbee.hive.lock import Held, Lock

log = logging.getLogger("rbee.hive")


class AtomicStorage(Storage):
    """A JSON file that is whole at every moment: temporary file, fsync, rename, fsync of the folder.

    The bytes before the last change stay in `.bak`, from which a file that was damaged from outside is replaced; the
    damaged one is kept beside it. Raises: SetupProblem when another process writes it, or when it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.backup = path.with_name(path.name + ".bak")
        self.problem = ""
        self._temporary = path.with_name(path.name + ".tmp")
        try:
            self._lock = Lock(path.with_name(path.name + ".lock"))
        except Held:
            raise SetupProblem(f"Another process writes {path}", hint="stop the other hive of this folder") from None
        self._temporary.unlink(missing_ok=True)

    def read(self) -> dict[str, dict[str, Any]] | None:
        """Return the tables, from the backup when the file itself is damaged; None when there is nothing yet."""
        try:
            return _decode(self.path.read_bytes())
        except FileNotFoundError:
            damaged = ""
        except (ValueError, msgspec.DecodeError) as problem:
            damaged = str(problem)
        return self._recover(damaged) if damaged or self.backup.exists() else None

    def write(self, data: dict[str, dict[str, Any]]) -> None:
        """Replace the content. Raises: SetupProblem, and the content stays as it was."""
        encoded = msgspec.json.encode(data)
        try:
            self._replace(encoded)
        except OSError as problem:
            self._temporary.unlink(missing_ok=True)
            why = problem.strerror
            raise SetupProblem(f"Cannot write {self.path} ({why})", hint=f"df -h {self.path.parent}") from None

    def close(self) -> None:
        """Let another process write."""
        self._lock.close()

    def _replace(self, encoded: bytes) -> None:
        with open(os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(encoded)
            file.flush()
            os.fsync(file.fileno())
        if self.path.exists():
            # A second name for the bytes that are there, made elsewhere first: `.bak` too is whole at every moment.
            linked = self.backup.with_name(self.backup.name + ".tmp")
            linked.unlink(missing_ok=True)
            os.link(self.path, linked)
            os.replace(linked, self.backup)
        os.replace(self._temporary, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _recover(self, damaged: str) -> dict[str, dict[str, Any]] | None:
        what = f"was damaged ({damaged}; it is kept as {_put_aside(self.path)})" if damaged else "was missing"
        try:
            data = _decode(self.backup.read_bytes())
            how = f"went back to {self.backup.name}, the state before the last change"
        except FileNotFoundError:
            data, how = None, "there is no backup yet, so it starts empty"
        except (OSError, ValueError, msgspec.DecodeError):
            data, how = None, f"its backup too (it is kept as {_put_aside(self.backup)}), so it starts empty"
        self.problem = f"{self.path} {what}: {how}"
        log.error("%s", self.problem)
        if data is not None:
            self._replace(msgspec.json.encode(data))
        return data


def _put_aside(path: Path) -> str:
    kept = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    os.replace(path, kept)
    return kept.name


def _decode(content: bytes) -> dict[str, dict[str, Any]]:
    return msgspec.json.decode(content, type=dict[str, dict[str, Any]])
