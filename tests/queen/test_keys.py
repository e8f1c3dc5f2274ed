"""API keys: what opens, what does not, and what is on the disk."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest

from rbee.errors import AccessDenied, NotFound, SetupProblem
from rbee.queen.keys import ADMIN, INFERENCE, KeyStore


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
