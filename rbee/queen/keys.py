"""API keys: made once, shown once, stored as a keyed hash."""

from __future__ import annotations

import contextlib
import hmac
import mmap
import os
import secrets
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from rbee import paths
from rbee.errors import AccessDenied, Busy, InvalidInput, NotFound, SetupProblem
from rbee.queen.policy import NO_LIMITS, Policy, policy_of

PREFIX = "rbee_sk_"
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ID_CHARS = 8
MAX_NAME_CHARS = 100
SECRET_CHARS = 43  # 62**43 > 2**256
CHECK_CHARS = 6

INFERENCE = "inference"
ADMIN = "admin"
METRICS = "metrics"
SCOPES = (INFERENCE, METRICS, ADMIN)

SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, digest BLOB NOT NULL, scopes TEXT NOT NULL,
    created_at REAL NOT NULL, expires_at REAL, revoked_at REAL
) STRICT;
CREATE TABLE IF NOT EXISTS pepper (value BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS policies (
    key_id TEXT PRIMARY KEY REFERENCES keys (id), policy TEXT NOT NULL
) STRICT;
"""
# What a key allows has a table of its own, so that a file of an earlier release opens as it is, and an earlier release
# can still open this one after a rollback.
SHOWN = """SELECT id, name, scopes, created_at, expires_at, revoked_at, coalesce(policy, '{}'), digest
    FROM keys LEFT JOIN policies ON key_id = id"""
LOCK_TIMEOUT_S = 5.0
COUNTER = slice(24, 28)
"""Where a database file counts its changes (sqlite.org/fileformat2.html, 1.3.6)."""
SAME_FILE_S = 0.25
"""How long another file in the place of this one may go unnoticed: nothing of rbee's puts one there."""

Row = tuple[str, str, str, float, float | None, float | None, str, bytes]
Stamp = tuple[int, bytes]


@dataclass(frozen=True)
class Key:
    """One key as it may be shown: everything but its secret. Times are seconds since the epoch."""

    id: str
    name: str
    scopes: frozenset[str]
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    policy: Policy = NO_LIMITS

    @property
    def state(self) -> str:
        """Return active, expired or revoked."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= time.time() else "active"


class KeyStore:
    """The keys in one SQLite file of mode 0600.

    Several programs write it (the queen and the command line), so it keeps a rollback journal: SQLite before 3.51.3
    can corrupt a WAL that two connections check-point, and keys are written rarely. `check` answers from memory; the
    file's own change counter tells when another program has written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, tuple[Key, bytes]] = {}
        self._stamp: Stamp | None = None
        self._head: mmap.mmap | None = None
        self._descriptor = -1
        self._file, self._file_at = (0, 0), float("-inf")
        self._opened: dict[str, Key] = {}
        paths.private(path.parent)
        if not path.exists():
            path.touch(mode=0o600)
        with self._open() as db:
            db.executescript(SCHEMA)
            if db.execute("SELECT count(*) FROM pepper").fetchone()[0] == 0:
                db.execute("INSERT INTO pepper VALUES (?)", (secrets.token_bytes(32),))
            self._pepper: bytes = db.execute("SELECT value FROM pepper").fetchone()[0]

    def create(
        self,
        name: str,
        *,
        scopes: frozenset[str] = frozenset({INFERENCE}),
        expires_at: float | None = None,
        policy: Policy = NO_LIMITS,
    ) -> tuple[Key, str]:
        """Make a key and return it with its secret, which cannot be had again. Raises: InvalidInput for its name."""
        if not name.strip() or len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise InvalidInput(f"A key's name has 1 to {MAX_NAME_CHARS} characters in one line", hint="whose key it is")
        key = Key(_random(ID_CHARS), name, scopes, time.time(), expires_at, None, policy)
        body = key.id + _random(SECRET_CHARS)
        secret = PREFIX + body + _checksum(body)
        with self._open() as db:
            db.execute(
                "INSERT INTO keys (id, name, digest, scopes, created_at, expires_at) VALUES (?, ?, ?, ?, ?, ?)",
                (key.id, name, self._digest(secret), " ".join(sorted(scopes)), key.created_at, expires_at),
            )
            _put_policy(db, key)
        return key, secret

    def list(self) -> list[Key]:
        """Return every key, the oldest first."""
        with self._open() as db:
            return [_key(row) for row in db.execute(f"{SHOWN} ORDER BY created_at")]

    def get(self, key_id: str) -> Key:
        """Return one key. Raises: NotFound."""
        with self._open() as db:
            return _find(db, key_id)

    def change(
        self,
        key_id: str,
        *,
        scopes: frozenset[str] | None = None,
        expires_at: float | msgspec.UnsetType | None = msgspec.UNSET,
        policy: Mapping[str, object] = {},
    ) -> Key:
        """Change what a key allows from the next request on: only what is given. Raises: NotFound, InvalidInput."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")  # two who change one key at once must both be heard
            old = _find(db, key_id)
            if old.revoked_at is not None:
                raise InvalidInput(f"The key {old.id} ({old.name}) is revoked, and stays so", hint="rbee key create")
            key = replace(
                old,
                scopes=old.scopes if scopes is None else scopes,
                expires_at=old.expires_at if isinstance(expires_at, msgspec.UnsetType) else expires_at,
                policy=policy_of({**msgspec.structs.asdict(old.policy), **policy}),
            )
            db.execute(
                "UPDATE keys SET scopes = ?, expires_at = ? WHERE id = ?",
                (" ".join(sorted(key.scopes)), key.expires_at, key_id),
            )
            _put_policy(db, key)
        return key

    def revoke(self, key_id: str) -> Key:
        """Make a key useless from the next request on. Raises: NotFound."""
        with self._open() as db:
            db.execute("UPDATE keys SET revoked_at = coalesce(revoked_at, ?) WHERE id = ?", (time.time(), key_id))
            return _find(db, key_id)

    def stale(self) -> bool:
        """Return True when the file has changed since it was read: `reload` before `check`, where waiting is bad."""
        return self._stamp is None or self._look() != self._stamp

    def reload(self) -> None:
        """Read every key. Raises: SetupProblem, Busy."""
        before = self._look()
        with self._open() as db:
            rows = db.execute(SHOWN).fetchall()
        self._known = {row[0]: (_key(row), row[7]) for row in rows}
        self._opened = {}
        # A change in between is seen at the next look.
        self._stamp = before

    def check(self, secret: str) -> Key:
        """Return the key that `secret` opens. Raises: AccessDenied, never returns an empty identity."""
        if self.stale():
            self.reload()
        # A dict compares two texts only when their hashes, salted in each process, are the same: time tells nothing.
        key = self._opened.get(secret)
        if key is None:
            key = self._opened[secret] = self._check(secret)
        if key.state != "active":
            raise no_key()
        return key

    def _check(self, secret: str) -> Key:
        digest = self._digest(secret[:256])
        body = secret.removeprefix(PREFIX)
        shaped = (
            secret.startswith(PREFIX)
            and len(body) == ID_CHARS + SECRET_CHARS + CHECK_CHARS
            and body.isascii()
            and body[-CHECK_CHARS:] == _checksum(body[:-CHECK_CHARS])
        )
        found = self._known.get(body[:ID_CHARS]) if shaped else None
        # An unknown id takes the same steps as a wrong secret.
        stored = found[1] if found is not None else b"\0" * 32
        if not hmac.compare_digest(stored, digest) or found is None:
            raise no_key()
        return found[0]

    def _look(self) -> Stamp | None:
        """Return what changes with every change of the file: which file it is, and its own counter."""
        now = time.monotonic()
        try:
            if now - self._file_at > SAME_FILE_S:
                self._file_at = now
                self._map()
        except (OSError, ValueError):  # it is gone, or empty
            self._head, self._file_at = None, float("-inf")
        # Read from the page cache that every writer shares: there is no call to the system on a job's way.
        return None if self._head is None else (self._file[1], self._head[COUNTER])

    def _map(self) -> None:
        """Map the file's head, unless that very file is mapped. Raises: OSError, ValueError."""
        found = os.stat(self._path)
        if self._head is not None and self._file == (found.st_dev, found.st_ino):
            return
        # Never closed while the file is in place: closing any descriptor of a file drops this process' POSIX locks on
        # it, those of SQLite too (sqlite.org/howtocorrupt.html, 2.2).
        before, self._descriptor = self._descriptor, os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self._head = mmap.mmap(self._descriptor, mmap.PAGESIZE, access=mmap.ACCESS_READ)
        self._file = (found.st_dev, found.st_ino)
        if before >= 0:
            os.close(before)

    def _digest(self, secret: str) -> bytes:
        return hmac.digest(self._pepper, secret.encode("utf-8", "replace"), "sha256")

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            db = sqlite3.connect(self._path, timeout=LOCK_TIMEOUT_S)
        except sqlite3.Error as problem:
            raise SetupProblem(f"Cannot open the key file {self._path} ({problem})") from None
        try:
            with db:
                db.execute("PRAGMA synchronous = FULL")
                yield db
        except sqlite3.DatabaseError as problem:
            if getattr(problem, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise Busy(f"The key file {self._path} is in use by another program") from None
            raise SetupProblem(f"The key file {self._path} cannot be used ({problem})") from None
        finally:
            db.close()


def no_key() -> AccessDenied:
    """Return the one refusal of whoever has no key that opens: why it does not is for the owner of the keys alone."""
    return AccessDenied(
        "A valid API key is needed: there is none, or it is wrong, expired or revoked",
        hint="Authorization: Bearer KEY, with a KEY from: rbee key create NAME, on the queen's machine",
    )


def _key(row: Row) -> Key:
    policy = policy_of(msgspec.json.decode(row[6]))
    return Key(row[0], row[1], frozenset(row[2].split()), row[3], row[4], row[5], policy)


def _find(db: sqlite3.Connection, key_id: str) -> Key:
    row = db.execute(f"{SHOWN} WHERE id = ?", (key_id,)).fetchone()
    if row is None:
        raise NotFound(f"There is no key {key_id!r}", hint="rbee key list")
    return _key(row)


def _put_policy(db: sqlite3.Connection, key: Key) -> None:
    text = msgspec.json.encode(key.policy).decode()
    db.execute("INSERT OR REPLACE INTO policies VALUES (?, ?)", (key.id, text))


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def _checksum(body: str) -> str:
    """CRC-32 in base 62: a mistyped or cut key is told from a wrong one without a look-up."""
    value, digits = zlib.crc32(body.encode()), ""
    for _ in range(CHECK_CHARS):
        value, digit = divmod(value, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits
