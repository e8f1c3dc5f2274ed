"""What the reconciler keeps in its folder: its state, what it tells others, its history, and what others ask of it."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from rbee.errors import Busy, NotFound, SetupProblem
from rbee.paths import private, write_private
from rbee.wire.gitops import STATUS_FILE, SYNC_FILE, GitopsStatus

STATE_FILE, LOCK_FILE, AUDIT_FILE = "state.json", "lock", "audit.jsonl"
ACCEPT_FILE, SUSPENDED_FILE = "accept", "suspended"
AUDIT_BYTES = 8 * 1024 * 1024


class HostRecord(Struct, kw_only=True):
    """One host: the revision it has, and when it is tried again when it lacks the wanted one."""

    revision: str = ""
    state: str = "waiting"
    """converged, waiting, unreachable, refused, busy, failed or drifted."""
    error: str = ""
    attempts: int = 0
    retry_at: float = 0.0


class State(Struct, kw_only=True):
    """What must outlive the reconciler. Revisions are whole hashes; times are seconds since the epoch."""

    source: str = ""
    followed: str = ""
    """The branch's newest commit that was let in: signed when that is asked for, and no rewrite of history."""
    signed: bool = False
    """Whether `followed` was let in with its signature checked."""
    good: str = ""
    """The newest commit that the fleet took; hosts that were away get it later."""
    settled: str = ""
    """The newest commit that every host had."""
    failed: str = ""
    """The commit that was given up, and is tried again at `retry_at`."""
    failure: str = ""
    attempts: int = 0
    retry_at: float = 0.0
    restoring: bool = False
    """Whether hosts may still have the failed commit."""
    refusal: str = ""
    """Why the branch's newest commit was not let in."""
    fetch_error: str = ""
    fetch_failures: int = 0
    checked_at: float = 0.0
    applied_at: float = 0.0
    looked_at: float = 0.0
    """When all hosts were last compared with `good`."""
    drift_error: str = ""
    """Why they could not be compared."""
    hosts: dict[str, HostRecord] = {}


class Suspension(Struct, frozen=True, kw_only=True):
    """Who asked the reconciler to change nothing, when and why."""

    reason: str = ""
    by: str = ""
    at: float = 0.0


class Records:
    """The reconciler's folder. Every file in it is written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the one reconciler of this folder. Raises: Busy with the process that is."""
        private(self.folder)
        descriptor = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.read(descriptor, 100).decode("utf-8", "replace").strip()
                raise Busy(
                    f"Another reconciler works in {self.folder} (process {holder or 'unknown'})",
                    hint="another --folder",
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def is_held(self) -> bool:
        """Tell whether a reconciler runs here."""
        try:
            descriptor = os.open(self.folder / LOCK_FILE, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def load(self) -> State:
        """Return the state, or a new one. Raises: SetupProblem when the file is damaged."""
        path = self.folder / STATE_FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=State)
        except FileNotFoundError:
            return State()
        except msgspec.DecodeError as problem:
            # Guessing would let a rewritten branch in, so a person decides.
            raise SetupProblem(f"{path} is damaged ({problem})", hint=f"rm {path}, then: rbee gitops run") from None

    def save(self, state: bytes, status: bytes) -> None:
        """Write the state, then what others see of it, both as JSON."""
        write_private(self.folder / STATE_FILE, state)
        write_private(self.folder / STATUS_FILE, status)

    def status(self) -> GitopsStatus | None:
        """Return what the reconciler told last, or None. Raises: SetupProblem when the file is damaged."""
        path = self.folder / STATUS_FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=GitopsStatus)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as problem:
            raise SetupProblem(f"{path} is damaged ({problem})") from None

    def audit(self, entry: Mapping[str, Any]) -> None:
        """Append a line to the history; the last 8 MiB and the 8 before them are kept."""
        path = self.folder / AUDIT_FILE
        if path.exists() and path.stat().st_size > AUDIT_BYTES:
            path.replace(path.with_suffix(".jsonl.1"))
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, json.dumps({"at": time.time(), **entry}).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def history(self, lines: int) -> list[dict[str, Any]]:
        """Return the history's last entries, the oldest first; a line that a crash cut short is left out."""
        found = []
        for name in (f"{AUDIT_FILE}.1", AUDIT_FILE):
            with contextlib.suppress(FileNotFoundError):
                for line in (self.folder / name).read_text(errors="replace").splitlines():
                    with contextlib.suppress(ValueError):
                        found.append(json.loads(line))
        return found[-lines:] if lines else []

    def suspension(self) -> Suspension | None:
        """Return who suspended the reconciler, or None; a file that cannot be read suspends it too."""
        try:
            return msgspec.json.decode((self.folder / SUSPENDED_FILE).read_bytes(), type=Suspension)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError:
            return Suspension(reason=f"{SUSPENDED_FILE} is damaged")

    def suspend(self, reason: str) -> None:
        """Have the reconciler change nothing, until `resume`."""
        told = Suspension(reason=reason, by=getpass.getuser(), at=time.time())
        self._ask(SUSPENDED_FILE, msgspec.json.encode(told))

    def resume(self) -> bool:
        """Let the reconciler go on; return whether it was suspended."""
        try:
            (self.folder / SUSPENDED_FILE).unlink()
        except FileNotFoundError:
            return False
        return True

    def ask_sync(self) -> None:
        """Have the reconciler look at once."""
        self._ask(SYNC_FILE, b"")

    def takes_sync(self) -> bool:
        """Tell whether somebody asked, once."""
        return _taken(self.folder / SYNC_FILE) is not None

    def ask_accept(self, revision: str) -> None:
        """Have the reconciler follow the branch from this commit on, though it rewrites history."""
        self._ask(ACCEPT_FILE, revision.encode())

    def _ask(self, name: str, data: bytes) -> None:
        """Leave a request, for the reconciler's user to read: root may ask for a service."""
        if not self.folder.is_dir():
            raise NotFound(f"There is no reconciler's folder {self.folder}", hint="rbee gitops run, or --folder DIR")
        write_private(self.folder / name, data)
        if os.geteuid() == 0:
            owner = self.folder.stat()
            os.chown(self.folder / name, owner.st_uid, owner.st_gid)

    def takes_accept(self) -> str:
        """Return the commit that somebody accepted, once; nothing when nobody did."""
        return (_taken(self.folder / ACCEPT_FILE) or b"").decode("utf-8", "replace").strip()


def _taken(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
        path.unlink()
    except FileNotFoundError:
        return None
    return data
