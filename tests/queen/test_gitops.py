"""What the queen shows of the reconciler, and who may wake it."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest
from queen_rig import FleetFolder, settings_file

from rbee.testing.programs import RunningQueen, running_queen
from rbee.wire.gitops import GitopsHost, GitopsState, GitopsStatus

SECRET = "a secret that the forge knows too"
FAILED = GitopsStatus(
    revision="a" * 40,
    wanted="b" * 40,
    state=GitopsState.FAILED,
    error="one: <script>no connection</script>",
    checked_at=1000.0,
    applied_at=900.0,
    hosts={"one": GitopsHost(revision="a" * 40, state="failed", error="no connection", attempts=3)},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gitops")


@pytest.fixture(scope="module")
def queen(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningQueen]:
    """Return a queen with a reconciler's folder."""
    place = tmp_path_factory.mktemp("queen")
    settings = settings_file(place, FleetFolder(place / "inventory"), gitops=str(folder), require_key=False)
    with running_queen("--settings", settings) as running:
        yield running


@pytest.fixture(autouse=True)
def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def tell(folder: Path, status: GitopsStatus) -> None:
    (folder / "status.json").write_bytes(msgspec.json.encode(status))


def call(queen: RunningQueen, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, answer.headers["content-type"], answer.read().decode()
    connection.close()
    return found


def test_the_status_is_what_the_reconciler_wrote_and_its_age(queen: RunningQueen, folder: Path) -> None:
    now = time.time()
    tell(folder, msgspec.structs.replace(FAILED, checked_at=now - 5))
    status, _, text = call(queen, "GET", "/gitops/status", Accept="*/*")
    found = json.loads(text)
    assert status == 200
    assert found["hosts"]["one"] == {"revision": "a" * 40, "state": "failed", "error": "no connection", "attempts": 3}
    assert 5 <= found["age_s"] <= 5 + time.time() - now + 0.001


def test_a_browser_gets_a_page(queen: RunningQueen, folder: Path) -> None:
    tell(folder, FAILED)
    accept = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
    status, kind, text = call(queen, "GET", "/gitops/status", Accept=accept)
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert "failed" in text
    assert "no connection" in text
    assert "<script>" not in text


def test_without_a_reconciler_there_is_nothing(queen: RunningQueen, folder: Path) -> None:
    assert call(queen, "GET", "/gitops/status")[0] == 404
    assert "rbee_gitops" not in call(queen, "GET", "/metrics")[2]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"state": "odd"}', b"\xff"])
def test_a_damaged_status_is_said(queen: RunningQueen, folder: Path, damage: bytes) -> None:
    (folder / "status.json").write_bytes(damage)
    status, _, text = call(queen, "GET", "/gitops/status")
    assert status == 500
    assert str(folder / "status.json") in text
    assert "rbee_gitops_failing 1.0" in call(queen, "GET", "/metrics")[2].splitlines()


def test_the_metrics(queen: RunningQueen, folder: Path) -> None:
    tell(folder, FAILED)
    lines = call(queen, "GET", "/metrics")[2].splitlines()
    assert "rbee_gitops_failing 1.0" in lines
    assert "rbee_gitops_last_success_timestamp_seconds 900.0" in lines
    assert "rbee_gitops_last_check_timestamp_seconds 1000.0" in lines
    assert f'rbee_gitops_info{{revision="{"a" * 40}",state="failed",wanted="{"b" * 40}"}} 1.0' in lines
    tell(folder, msgspec.structs.replace(FAILED, state=GitopsState.CONVERGED))
    assert "rbee_gitops_failing 0.0" in call(queen, "GET", "/metrics")[2].splitlines()


def signed(body: bytes, secret: str = SECRET) -> str:
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def test_its_operator_and_the_forges_may_wake_it(queen: RunningQueen, folder: Path) -> None:
    (folder / "webhook.secret").write_text(SECRET + "\n")
    body = b'{"ref": "refs/heads/main", "padding": "' + b"x" * 6_000_000 + b'"}'
    for headers in (
        {"Authorization": f"Bearer {queen.record.token}"},
        {"X_Hub_Signature_256": signed(body)},
        {"X_Gitlab_Token": SECRET},
    ):
        assert (
            call(queen, "POST", "/gitops/sync", body if "X_Hub_Signature_256" in headers else b"", **headers)[0] == 202
        )
        (folder / "sync").unlink()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"X_Hub_Signature_256": signed(b"{}", "another secret, long enough")},
        {"X_Hub_Signature_256": signed(b"another body")},
        {"X_Hub_Signature_256": ""},
        {"X_Gitlab_Token": "another secret, long enough"},
        {"X_Gitlab_Token": ""},
    ],
)
@pytest.mark.parametrize("secret", [SECRET, "", None])
def test_nobody_else_may(queen: RunningQueen, folder: Path, headers: dict[str, str], secret: str | None) -> None:
    if secret is not None:
        (folder / "webhook.secret").write_text(secret)
    assert call(queen, "POST", "/gitops/sync", b"{}", **headers)[0] == 401
    assert not (folder / "sync").exists()
