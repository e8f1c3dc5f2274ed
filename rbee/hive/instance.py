"""One hive a person and machine: who it is, its token, and what a second one finds."""

from __future__ import annotations

import contextlib
import os
import secrets
import ssl
import time
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from rbee.client import Client
from rbee.errors import RbeeError, SetupProblem
from rbee.hive.lock import Held, Lock
from rbee.paths import write_private
from rbee.tokens import read_token

WAIT_FOR_PREDECESSOR_S = 12.0


class HiveRecord(Struct, frozen=True, kw_only=True):
    """`hive.json` in the state folder: how others find the running hive, and its last epoch."""

    pid: int
    url: str
    epoch: float
    version: str


class Health(Struct, frozen=True, kw_only=True):
    """The body of a hive's `/health`; `status` is ok or draining."""

    status: str
    hive: str
    version: str
    pid: int


class AlreadyRuns(Exception):
    """A hive of the same person is at this address already."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"a hive already runs on this machine (pid {pid})")
        self.pid = pid


class Instance:
    """The right to be this machine's hive, held until the process ends."""

    def __init__(self, path: Path, lock: Lock) -> None:
        self._lock = lock
        # A clock set back must not make the reports of this start look older than those of the last one.
        last = read_record(path)
        self.epoch = max(time.time(), last.epoch + 1 if last else 0.0)

    def publish(self, url: str, version: str) -> None:
        """Tell others where this hive listens."""
        record = HiveRecord(pid=os.getpid(), url=url, epoch=self.epoch, version=version)
        self._lock.write(msgspec.json.encode(record))

    def close(self) -> None:
        """Let another hive be it."""
        self._lock.close()


def claim(state: Path, port: int, token: str, tls: ssl.SSLContext | None = None) -> Instance:
    """Become this person's hive, waiting for one that is about to end.

    Raises: AlreadyRuns when the holder answers on `port`; SetupProblem when it answers elsewhere or not at all.
    """
    path = state / "hive.json"
    deadline = time.monotonic() + WAIT_FOR_PREDECESSOR_S
    while True:
        try:
            return Instance(path, Lock(path))
        except Held:
            holder = read_record(path)
        if holder and (health := probe(holder.url, token, tls)) and health.status == "ok":
            if urlsplit(holder.url).port == port:
                raise AlreadyRuns(health.pid)
            raise SetupProblem(
                f"A hive already runs here at {holder.url} (pid {health.pid}), and {state} is for one hive",
                hint="stop it first, or give this one a folder of its own with RBEE_HOME",
            )
        if time.monotonic() > deadline:
            raise SetupProblem(
                f"Another hive{f' (pid {holder.pid})' if holder else ''} holds {path} and does not answer",
                hint=f"kill {holder.pid}" if holder else "look for it with: ps aux | grep rbee.hive",
            )
        time.sleep(0.05)


def probe(url: str, token: str, tls: ssl.SSLContext | None = None) -> Health | None:
    """Return the health of a hive at `url` that takes `token`, or None."""
    client = Client(url, token=token, timeout_s=2.0, connect_timeout_s=1.0, tls=tls)
    try:
        health = client.get("/health", Health)
        client.send("GET", "/v1/hive").close()
    except (RbeeError, ValueError):
        return None
    finally:
        client.close()
    return health


def read_record(path: Path) -> HiveRecord | None:
    """Return what the last hive wrote, or None when it wrote nothing that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=HiveRecord)
    except (OSError, msgspec.DecodeError):
        return None


def token_from(path: Path, *, make: bool) -> str:
    """Return the token in a file; with `make`, one of 256 bits is put there when there is no file.

    Raises: SetupProblem.
    """
    if make and not path.exists():
        try:
            _put(path, secrets.token_urlsafe(32))
        except OSError as problem:
            raise SetupProblem(f"The token file {path} cannot be made ({problem.strerror})") from None
    return read_token(path)


def _put(path: Path, token: str) -> None:
    """A link, not a rename: when two programs make the token at once, both end with the first one's."""
    mine = path.with_name(f".{path.name}.{os.getpid()}")
    write_private(mine, token.encode() + b"\n")
    try:
        with contextlib.suppress(FileExistsError):
            os.link(mine, path)
    finally:
        mine.unlink()
