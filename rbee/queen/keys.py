"""API keys: made once, shown once, stored as a keyed hash."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import sqlite3
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rbee import paths
from rbee.errors import AccessDenied, NotFound, SetupProblem

PREFIX = "rbee_sk_"
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ID_CHARS = 8
SECRET_CHARS = 43  # 62**43 > 2**256
CHECK_CHARS = 6

INFERENCE = "inference"
ADMIN = "admin"

SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, digest BLOB NOT NULL, scopes TEXT NOT NULL,
    created_at REAL NOT NULL, expires_at REAL, revoked_at REAL
) STRICT;
CREATE TABLE IF NOT EXISTS pepper (value BLOB NOT NULL) STRICT;
"""


@dataclass(frozen=True)
class Key:
    """One key as it may be shown: everything but its secret. Times are seconds since the epoch."""

    id: str
    name: str
    scopes: frozenset[str]
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    @property
    def state(self) -> str:
        """Return active, expired or revoked."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= time.time() else "active"


class KeyStore:
    """The keys in one SQLite file of mode 0600.

    Several programs write it (the queen and the command line), so it keeps a rollback journal: SQLite before 3.51.3
    can corrupt a WAL that two connections check-point, and keys are written rarely.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        paths.private(path.parent)
        if not path.exists():
            path.touch(mode=0o600)
        with self._open() as db:
            db.executescript(SCHEMA)
            if db.execute("SELECT count(*) FROM pepper").fetchone()[0] == 0:
                db.execute("INSERT INTO pepper VALUES (?)", (secrets.token_bytes(32),))
            self._pepper: bytes = db.execute("SELECT value FROM pepper").fetchone()[0]

    def create(
        self, name: str, *, scopes: frozenset[str] = frozenset({INFERENCE}), expires_at: float | None = None
    ) -> tuple[Key, str]:
        """Make a key and return it with its secret, which cannot be had again."""
        key = Key(_random(ID_CHARS), name, scopes, time.time(), expires_at)
        body = key.id + _random(SECRET_CHARS)
        secret = PREFIX + body + _checksum(body)
        with self._open() as db:
            db.execute(
                "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, NULL)",
                (key.id, name, self._digest(secret), " ".join(sorted(scopes)), key.created_at, expires_at),
            )
        return key, secret

    def list(self) -> list[Key]:
        """Return every key, the oldest first."""
        with self._open() as db:
            rows = db.execute(
                "SELECT id, name, scopes, created_at, expires_at, revoked_at FROM keys ORDER BY created_at"
            )
            return [_key(row) for row in rows]

    def revoke(self, key_id: str) -> Key:
        """Make a key useless from the next request on. Raises: NotFound."""
        with self._open() as db:
            db.execute("UPDATE keys SET revoked_at = coalesce(revoked_at, ?) WHERE id = ?", (time.time(), key_id))
            row = db.execute(
                "SELECT id, name, scopes, created_at, expires_at, revoked_at FROM keys WHERE id = ?", (key_id,)
            ).fetchone()
        if row is None:
            raise NotFound(f"There is no key {key_id!r}", hint="rbee key list")
        return _key(row)

    def check(self, secret: str) -> Key:
        """Return the key that `secret` opens. Raises: AccessDenied, never returns an empty identity."""
        body = secret.removeprefix(PREFIX)
        shaped = (
            secret.startswith(PREFIX)
            and len(body) == ID_CHARS + SECRET_CHARS + CHECK_CHARS
            and body.isascii()
            and body[-CHECK_CHARS:] == _checksum(body[:-CHECK_CHARS])
        )
        row = None
        if shaped:
            with self._open() as db:
                row = db.execute(
                    "SELECT id, name, scopes, created_at, expires_at, revoked_at, digest FROM keys WHERE id = ?",
                    (body[:ID_CHARS],),
                ).fetchone()
        # An unknown id takes the same steps as a wrong secret.
        stored = row[6] if row is not None else b"\0" * 32
        if not hmac.compare_digest(stored, self._digest(secret[:256])) or row is None:
            raise AccessDenied("The API key is not valid", hint="rbee key create NAME, on the queen's machine")
        key = _key(row[:6])
        if key.state != "active":
            raise AccessDenied(
                f"The API key {key.id} is {key.state}", hint="rbee key create NAME, on the queen's machine"
            )
        return key

    def _digest(self, secret: str) -> bytes:
        return hmac.new(self._pepper, secret.encode("utf-8", "replace"), hashlib.sha256).digest()

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            db = sqlite3.connect(self._path, timeout=5.0)
        except sqlite3.Error as problem:
            raise SetupProblem(f"Cannot open the key file {self._path} ({problem})") from None
        try:
            with db:
                db.execute("PRAGMA synchronous = FULL")
                yield db
        except sqlite3.DatabaseError as problem:
            raise SetupProblem(f"The key file {self._path} cannot be used ({problem})") from None
        finally:
            db.close()


def _key(row: tuple[str, str, str, float, float | None, float | None]) -> Key:
    return Key(row[0], row[1], frozenset(row[2].split()), row[3], row[4], row[5])


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def _checksum(body: str) -> str:
    """CRC-32 in base 62: a mistyped or cut key is told from a wrong one without a look-up."""
    value, digits = zlib.crc32(body.encode()), ""
    for _ in range(CHECK_CHARS):
        value, digit = divmod(value, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits
