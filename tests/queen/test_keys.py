"""API keys: what opens, what does not, and what is on the disk."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import stat
import time
from pathlib import Path

import pytest

from rbee.errors import AccessDenied, Busy, InvalidInput, NotFound, SetupProblem
from rbee.queen.keys import ADMIN, INFERENCE, METRICS, KeyStore
from rbee.queen.policy import Policy


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "state" / "keys.sqlite")


def test_a_key_opens_and_its_secret_is_not_stored(store: KeyStore, tmp_path: Path) -> None:
    key, secret = store.create("zed", scopes=frozenset({INFERENCE, ADMIN}))
    assert secret.startswith("rbee_sk_")
    assert store.check(secret) == key
    assert key.scopes == {INFERENCE, ADMIN}
    path = tmp_path / "state" / "keys.sqlite"
    assert secret[16:].encode() not in path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_another_program_sees_the_same_keys(store: KeyStore, tmp_path: Path) -> None:
    key, secret = store.create("one")
    other = KeyStore(tmp_path / "state" / "keys.sqlite")
    assert other.check(secret).id == key.id
    other.revoke(key.id)
    with pytest.raises(AccessDenied, match="revoked"):
        store.check(secret)
    assert [k.state for k in store.list()] == ["revoked"]


def test_an_expired_key_does_not_open(store: KeyStore) -> None:
    _, secret = store.create("old", expires_at=time.time() - 1)
    with pytest.raises(AccessDenied, match="expired"):
        store.check(secret)


def test_near_misses_do_not_open(store: KeyStore) -> None:
    _, secret = store.create("zed")
    flipped = secret[:-1] + ("a" if secret[-1] != "a" else "b")
    for wrong in ("", " ", "rbee_sk_", secret[:-1], secret + "a", flipped, secret.swapcase(), "x' OR 1=1--",
                  "rbee_sk_" + "\0" * 57, "ключ", "a" * 1_000_000):  # fmt: skip
        with pytest.raises(AccessDenied):
            store.check(wrong)


def test_revoking_what_is_not_there_says_so(store: KeyStore) -> None:
    with pytest.raises(NotFound, match="rbee key list"):
        store.revoke("nothing")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(SetupProblem, match=r"keys\.sqlite"):
        KeyStore(path)


OLD_SCHEMA = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, digest BLOB NOT NULL, scopes TEXT NOT NULL,
    created_at REAL NOT NULL, expires_at REAL, revoked_at REAL
) STRICT;
CREATE TABLE pepper (value BLOB NOT NULL) STRICT;
"""


def test_a_file_of_the_first_release_opens_and_its_keys_can_be_limited(store: KeyStore, tmp_path: Path) -> None:
    key, secret = store.create("old")
    new = sqlite3.connect(tmp_path / "state" / "keys.sqlite")
    path = tmp_path / "old" / "keys.sqlite"
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as old:
        old.executescript(OLD_SCHEMA)
        old.executemany("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?)", new.execute("SELECT * FROM keys"))
        old.executemany("INSERT INTO pepper VALUES (?)", new.execute("SELECT value FROM pepper"))
        old.commit()
    new.close()
    opened = KeyStore(path)
    assert opened.check(secret) == key
    opened.change(key.id, policy={"requests_per_minute": 3})
    assert opened.check(secret).policy == Policy(requests_per_minute=3)


def test_a_change_counts_at_the_next_check_and_leaves_the_rest(store: KeyStore, tmp_path: Path) -> None:
    key, secret = store.create("acme", policy=Policy(tenant="acme", tokens_per_day=5), expires_at=time.time() + 60)
    assert store.check(secret).policy.tokens_per_day == 5
    assert not store.stale()
    other = KeyStore(tmp_path / "state" / "keys.sqlite")
    other.change(key.id, policy={"tokens_per_day": 0, "models": ("echo",)}, scopes=frozenset({METRICS}))
    assert store.stale()
    changed = store.check(secret)
    assert changed.policy == Policy(tenant="acme", models=("echo",))
    assert (changed.scopes, changed.expires_at) == (frozenset({METRICS}), key.expires_at)
    other.change(key.id, expires_at=None)
    assert store.check(secret).expires_at is None
    assert store.get(key.id) == store.check(secret)


def test_every_change_by_another_program_is_seen_at_once(store: KeyStore, tmp_path: Path) -> None:
    """Also when it follows another one so closely that the file's times are the same."""
    key, secret = store.create("k")
    other = KeyStore(tmp_path / "state" / "keys.sqlite")
    for limit in range(1, 50):
        other.change(key.id, policy={"requests_per_day": limit})
        assert store.check(secret).policy.requests_per_day == limit


def test_a_wrong_change_changes_nothing(store: KeyStore) -> None:
    key, secret = store.create("k")
    with pytest.raises(InvalidInput, match="priority"):
        store.change(key.id, policy={"priority": "urgent"})
    with pytest.raises(NotFound):
        store.change("nothing", policy={"tier": "gold"})
    assert store.check(secret) == key


def test_a_file_that_is_locked_is_busy_and_not_broken(
    store: KeyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, secret = store.create("k")
    monkeypatch.setattr("rbee.queen.keys.LOCK_TIMEOUT_S", 0.01)
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / "keys.sqlite")) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Busy, match=r"keys\.sqlite") as problem:
            store.check(secret)
        assert problem.value.status == 503
        writer.rollback()
    assert store.check(secret).name == "k"


def opens(store: KeyStore, secret: str) -> bool:
    try:
        store.check(secret)
    except AccessDenied:
        return False
    return True


def test_a_file_that_was_put_back_from_a_copy_is_read_again(store: KeyStore, tmp_path: Path) -> None:
    path = tmp_path / "state" / "keys.sqlite"
    _, secret = store.create("kept")
    shutil.copy(path, tmp_path / "copy")
    _, later = store.create("later")
    assert store.check(later).name == "later"
    (tmp_path / "copy").replace(path)
    deadline = time.monotonic() + 30
    while opens(store, later) and time.monotonic() < deadline:
        time.sleep(0.01)  # another file is looked for a few times a second
    assert not opens(store, later)
    assert store.check(secret).name == "kept"
