"""Follow the inventory on disk: what it says is in force a moment after it is saved, and mistakes change nothing."""

from __future__ import annotations

import logging
import os
import ssl
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import gevent
import msgspec
from gevent import subprocess
from gevent.threadpool import ThreadPool

from rbee import paths
from rbee.errors import SetupProblem
from rbee.http.tls import client_context
from rbee.inventory.fleet import Fleet as Inventory
from rbee.inventory.fleet import Host
from rbee.queen.read_inventory import Reading, decode, encode
from rbee.wire.fleet import Problem

log = logging.getLogger("rbee.queen.inventory")

LOOK_EVERY_S = 0.25
RETRY_S = 5.0
"""How often a folder with mistakes is read again though it looks the same: they may be in a file that it includes."""
READ_TIMEOUT_S = 20.0
FLEET_KEY, AUTHORITY = "fleet.key", "ca.crt"

Stamp = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Identity:
    """What the queen shows to hives, and by what she knows them; `problem` says what is missing of it."""

    key: str = ""
    tls: ssl.SSLContext | None = None
    problem: str = ""


class FollowedInventory:
    """The inventory in force, and what is wrong with the one on disk.

    A folder counts as saved once it looks the same twice, so that a file is not read while it is written. The last
    good inventory outlives this process in `memory`. With `optional`, a folder without *.conf has no hosts.
    `changed` is called, in the event loop, when hosts or identity are others than before.
    """

    def __init__(
        self,
        folder: Path,
        identity_folder: Path,
        memory: Path,
        *,
        optional: bool,
        read: Callable[[Path], Reading] | None = None,
    ) -> None:
        self.folder = folder
        self.inventory: Inventory | None = None
        self.mistakes: list[Problem] = []
        self.identity = Identity()
        self.since = 0.0
        self._identity_folder = identity_folder
        self._memory = memory
        self._optional = optional
        self._read = read or read_apart
        # Its own thread: names that do not resolve may hold those of the event loop's pool for long.
        self._pool = ThreadPool(1)
        self._seen: Stamp | None = None
        self._taken: Stamp | None = None
        self._identity_stamp: Stamp | None = None
        self._read_at = 0.0

    @property
    def hosts(self) -> list[Host]:
        """Return the hosts in force."""
        return self.inventory.hosts if self.inventory else []

    @property
    def valid(self) -> bool:
        """Return True when what is on disk is what is in force."""
        return not self.mistakes

    def run(self, changed: Callable[[], None]) -> NoReturn:
        """Follow the folder for ever."""
        while True:
            gevent.sleep(LOOK_EVERY_S)
            try:
                if self.look():
                    changed()
            except Exception:
                log.exception("following the inventory %s", self.folder)

    def look(self, *, first: bool = False) -> bool:
        """Look once, and return True when hosts or identity changed; `first` takes what is there without waiting."""
        stamp, identity_stamp = self._pool.apply(self._stamps)
        identity_changed = identity_stamp != self._identity_stamp
        if identity_changed:
            self._identity_stamp = identity_stamp
            self.identity = self._pool.apply(read_identity, (self._identity_folder,))
        settled, self._seen = first or stamp == self._seen, stamp
        due = stamp != self._taken or (self.mistakes and time.monotonic() - self._read_at > RETRY_S)
        if not (settled and due):
            return identity_changed
        self._taken, self._read_at = stamp, time.monotonic()
        return self._take(self._reading()) or identity_changed

    def _reading(self) -> Reading:
        if any(self.folder.glob("*.conf")):
            return self._read(self.folder)
        if self._optional:
            return Reading()
        return Reading(mistakes=[Problem(where=str(self.folder), message="There is no *.conf file in this folder")])

    def _take(self, reading: Reading) -> bool:
        """Put a reading into force and return True when that changes the hosts; one with mistakes changes nothing."""
        if reading.mistakes != self.mistakes:
            self.mistakes, self.since = reading.mistakes, time.time()
            for mistake in reading.mistakes:
                log.warning("%s: %s", mistake.where, mistake.message)
        if reading.mistakes:
            return self.inventory is None and self._recall()
        before, self.inventory = self.inventory, reading.fleet
        if _sha(before) == _sha(reading.fleet):
            return False
        self._pool.apply(self._remember, (reading,))
        log.info("the inventory %s is in force", self.folder)
        return True

    def _recall(self) -> bool:
        """Take up the last good inventory that an earlier process read in this folder."""
        try:
            remembered = decode(self._memory.read_bytes()).fleet
        except (OSError, msgspec.DecodeError):
            return False
        if remembered is None or remembered.folder != self.folder:
            return False
        self.inventory = remembered
        log.warning("the last good state of the inventory %s is in force", self.folder)
        return True

    def _remember(self, reading: Reading) -> None:
        try:
            if reading.fleet is None:
                self._memory.unlink(missing_ok=True)
            else:
                paths.write_private(self._memory, encode(reading))
        except OSError as problem:
            # It is in force all the same; only a queen that starts while it has mistakes would miss it.
            log.warning("%s cannot be written (%s)", self._memory, problem.strerror)

    def _stamps(self) -> tuple[Stamp, Stamp]:
        """Return how files, and the folders they lie in, look; a new file shows in its folder."""
        named = self.inventory.files if self.inventory else []
        files = {self.folder, *self.folder.glob("*.conf"), *named, *(path.parent for path in named)}
        identity = (self._identity_folder / FLEET_KEY, self._identity_folder / AUTHORITY)
        return _stamp(sorted(files)), _stamp(identity)


def read_apart(folder: Path) -> Reading:
    """Read an inventory in a process of its own, which may take 20 s."""
    command = [sys.executable, "-P", "-m", "rbee.queen.read_inventory", str(folder)]
    # A released rbee is on this process's path only.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=READ_TIMEOUT_S, cwd="/"
        )
        return decode(done.stdout)
    except subprocess.TimeoutExpired:
        why = f"It could not be read within {READ_TIMEOUT_S:g} s. Try: the commands of its `Match exec` lines"
    except OSError as problem:
        why = f"It could not be read ({problem.strerror})"
    except msgspec.DecodeError:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        why = f"Reading it failed with code {done.returncode}: {''.join(last)}"
    return Reading(mistakes=[Problem(where=str(folder), message=why)])


def read_identity(folder: Path) -> Identity:
    """Read the fleet's key and authority."""
    try:
        key = (folder / FLEET_KEY).read_text().strip()
        if len(key) < 16:
            return Identity(problem=f"{folder / FLEET_KEY} does not hold a fleet's key. Try: rbee apply")
        return Identity(key, client_context(folder / AUTHORITY))
    except (OSError, UnicodeDecodeError) as problem:
        why = getattr(problem, "strerror", None) or problem
        return Identity(problem=f"The queen cannot read {folder / FLEET_KEY} ({why}). Try: rbee apply")
    except SetupProblem as problem:
        return Identity(problem=str(problem))


def _stamp(files: Iterable[Path]) -> Stamp:
    found = []
    for path in files:
        try:
            status = path.stat()
        except OSError:
            continue
        found.append((str(path), status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


def _sha(inventory: Inventory | None) -> str:
    return inventory.sha256 if inventory else ""
