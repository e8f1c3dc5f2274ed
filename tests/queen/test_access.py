"""Who may call: by address, by key, by origin."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee.errors import AccessDenied, Forbidden
from rbee.queen.access import LOCAL, OPERATOR, Access
from rbee.queen.keys import ADMIN, INFERENCE, METRICS, KeyStore
from rbee.queen.settings import Settings

HERE = {"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "localhost:7833"}
AWAY = {"REMOTE_ADDR": "192.0.2.7", "HTTP_HOST": "queen:7833"}


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys.sqlite")


@pytest.fixture
def access(tmp_path: Path, keys: KeyStore) -> Access:
    return Access(Settings(state_dir=tmp_path, hive_token="h" * 32), keys)


@pytest.mark.parametrize(
    "environ",
    [
        HERE,
        {**HERE, "HTTP_HOST": "127.0.0.1:7833"},
        {**HERE, "REMOTE_ADDR": "::1", "HTTP_HOST": "[::1]:7833"},
        {**HERE, "HTTP_AUTHORIZATION": "Bearer anything-an-editor-insists-on"},
        {**HERE, "HTTP_X_API_KEY": "not-needed"},
        {**HERE, "HTTP_ORIGIN": "http://localhost:3000"},
    ],
)
def test_this_machine_needs_no_key(access: Access, environ: dict[str, str]) -> None:
    assert access.caller(environ) is LOCAL


@pytest.mark.parametrize(
    "environ",
    [
        AWAY,
        {**AWAY, "HTTP_AUTHORIZATION": "Bearer "},
        {**AWAY, "HTTP_AUTHORIZATION": "Bearer wrong"},
        {**AWAY, "HTTP_AUTHORIZATION": "Basic cmJlZTpyYmVl"},
        {**AWAY, "HTTP_AUTHORIZATION": "Bearer x' OR 1=1--"},
        {**HERE, "HTTP_AUTHORIZATION": "Bearer rbee_sk_wrong"},
        {**HERE, "HTTP_X_FORWARDED_FOR": "192.0.2.7"},
        {**HERE, "HTTP_VIA": "1.1 proxy"},
        {"REMOTE_ADDR": "", "HTTP_HOST": "localhost"},
    ],
)
def test_anyone_else_is_refused(access: Access, environ: dict[str, str]) -> None:
    with pytest.raises(AccessDenied) as refused:
        access.caller(environ)
    assert refused.value.status == 401


@pytest.mark.parametrize(
    "page",
    [
        {"HTTP_ORIGIN": "https://evil.example"},
        {"HTTP_ORIGIN": "null"},
        {"HTTP_ORIGIN": "http://localhost.evil.example"},
        {"HTTP_HOST": "rebound.example:7833"},
        {"HTTP_SEC_FETCH_SITE": "cross-site"},
    ],
)
def test_a_page_of_another_origin_is_refused(access: Access, page: dict[str, str]) -> None:
    with pytest.raises(Forbidden):
        access.caller({**HERE, **page})


def test_a_key_opens_from_anywhere(access: Access, keys: KeyStore) -> None:
    key, secret = keys.create("zed")
    assert access.caller({**AWAY, "HTTP_AUTHORIZATION": f"Bearer {secret}"}).id == key.id
    assert access.caller({**AWAY, "HTTP_AUTHORIZATION": f"bearer  {secret} "}).id == key.id
    assert access.caller({**AWAY, "HTTP_X_API_KEY": secret}).id == key.id


def test_a_key_can_be_required_here_too(tmp_path: Path, keys: KeyStore) -> None:
    access = Access(Settings(state_dir=tmp_path, require_key=True), keys)
    with pytest.raises(AccessDenied):
        access.caller(HERE)


def test_only_the_operator_controls(access: Access, keys: KeyStore, tmp_path: Path) -> None:
    with pytest.raises(AccessDenied):
        access.operator(HERE)
    _, plain = keys.create("zed")
    with pytest.raises(Forbidden, match="--admin"):
        access.operator({**HERE, "HTTP_AUTHORIZATION": f"Bearer {plain}"})
    _, admin = keys.create("ops", scopes=frozenset({INFERENCE, ADMIN}))
    assert ADMIN in access.operator({**AWAY, "HTTP_AUTHORIZATION": f"Bearer {admin}"}).scopes
    settings = Settings(state_dir=tmp_path)
    operator = Access(settings, keys).operator({**HERE, "HTTP_AUTHORIZATION": f"Bearer {settings.admin_token}"})
    assert operator is OPERATOR


def test_only_a_hive_reports(access: Access) -> None:
    with pytest.raises(AccessDenied):
        access.hive(HERE)
    assert access.hive({**HERE, "HTTP_AUTHORIZATION": "Bearer " + "h" * 32}).name == "hive"


def test_a_key_for_metrics_reads_them_and_uses_no_model(access: Access, keys: KeyStore) -> None:
    _, secret = keys.create("prometheus", scopes=frozenset({METRICS}))
    environ = {**AWAY, "HTTP_AUTHORIZATION": f"Bearer {secret}"}
    assert access.reader(environ).name == "prometheus"
    with pytest.raises(Forbidden):
        access.caller(environ)
    with pytest.raises(AccessDenied):
        access.reader(AWAY)
