"""What lies beside the inventory reaches the queen's host: who signs tokens, keys of servers, the routing script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rbee.apply.desired import UNITS, Desired, File, desired
from rbee.apply.identity import Identity, identity_of
from rbee.apply.plan import HostPlan, plan
from rbee.apply.queen_files import queen_extras, queen_files
from rbee.errors import SetupProblem
from rbee.inventory import read

QUEEN = """\
IgnoreUnknown Hive*,Queen*,Worker*,Model*,Gpu*,Region*,Tags,Rbee*
Host one
    HostName 192.0.2.1
    QueenPort 7833
Host cloud
    HostName api.example
    HivePort none
    Worker big url=https://api.example/v1 model=m key-file=keys/big.key
    Worker free url=https://free.example/v1 model=m
"""
ISSUER = {"issuer": "https://id.example/", "audience": "rbee", "jwks": "https://id.example/jwks.json"}
INVENTORY, KEYS = "/etc/rbee/inventory", "/etc/rbee/server-keys"
SECRET = b"sk-a-very-secret-key\n"


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return identity_of(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an inventory folder with a key of a server."""
    (tmp_path / "fleet.conf").write_text(QUEEN)
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "big.key").write_bytes(SECRET)
    return tmp_path


def want(folder: Path, identity: Identity) -> Desired:
    fleet = read(folder)
    queen = fleet.host("one")
    assert queen is not None
    return desired(
        fleet, queen, identity, {}, seen_certificate="its own", release="r1", models=[], devices=[],
        queen_files=queen_files(fleet),
    )  # fmt: skip


def told_of(wanted: Desired) -> dict[str, Any]:
    """Return what the agent tells of a host that is as it should be."""

    def file(path: str, one: File) -> dict[str, Any]:
        secret = path.startswith(("/etc/rbee/secrets/", KEYS, "/etc/rbee/worker-tokens/"))
        shown = {} if secret else {"text": one.content.decode()}
        return {"sha256": one.sha256, "mode": one.mode, "uid": 0 if one.owner == "root" else 999, **shown}

    state = {"ActiveState": "active", "SubState": "running", "UnitFileState": "enabled", "NeedDaemonReload": "no"}
    units = [path.removeprefix(f"{UNITS}/") for path in wanted.files if path.startswith(UNITS)]
    return {
        "files": {path: file(path, one) for path, one in wanted.files.items()},
        "folders": {path: list(way) for path, way in wanted.folders.items()},
        "units": dict.fromkeys(units, state),
        "records": {f"{service.unit}.json": {"hash": service.hash} for service in wanted.services},
        "users": {"rbee": 999},
        "current": "r1",
        "releases": ["r1"],
        "layers": [],
        "models": {},
    }


def compare(wanted: Desired, seen: dict[str, Any]) -> HostPlan:
    return plan(wanted, seen, packages=None, uploads=[], audit={})


def shown(found: HostPlan) -> str:
    return "\n".join(f"{c.sign} {c.subject} {c.detail} {c.reasons}\n" + "\n".join(c.diff) for c in found.changes)


def test_a_servers_key_is_a_secret_of_the_queens_user_and_her_inventory_names_it(
    folder: Path, identity: Identity
) -> None:
    wanted = want(folder, identity)
    key = wanted.files[f"{KEYS}/cloud.big"]
    assert (key.content, key.mode, key.owner, key.secret) == (SECRET, 0o400, "rbee", True)
    assert wanted.folders[KEYS] == (0o700, "rbee")
    inventory = wanted.files[f"{INVENTORY}/fleet.conf"].content.decode()
    assert f"key-file={KEYS}/cloud.big" in inventory
    assert str(folder) not in inventory
    assert [path for path in wanted.files if path.startswith(KEYS)] == [f"{KEYS}/cloud.big"]


def test_a_key_that_this_machine_lacks_lies_on_the_queens_host(folder: Path, identity: Identity) -> None:
    (folder / "keys" / "big.key").unlink()
    wanted = want(folder, identity)
    assert f"key-file={folder}/keys/big.key" in wanted.files[f"{INVENTORY}/fleet.conf"].content.decode()
    assert not [path for path in wanted.files if path.startswith(KEYS)]


def test_a_new_key_is_a_change_that_shows_nothing_and_restarts_nothing(folder: Path, identity: Identity) -> None:
    seen = told_of(want(folder, identity))
    assert compare(want(folder, identity), seen).is_empty
    (folder / "keys" / "big.key").write_bytes(b"sk-another-secret\n")
    found = compare(want(folder, identity), seen)
    text = shown(found)
    assert "cloud.big" in text
    assert "a secret" in text
    assert "sk-" not in text
    assert [change.subject for change in found.changes] == ["base"]
    assert not [service for order in found.orders.values() for service in order["services"]]


def test_what_leaves_the_inventory_leaves_the_host(folder: Path, identity: Identity) -> None:
    (folder / "jwt.yaml").write_text(yaml.safe_dump({**ISSUER, "jwks": "jwks.json"}))
    (folder / "jwks.json").write_text('{"keys": []}')
    (folder / "scheduler.rhai").write_text("fn route_task(task, workers) { workers.first() }")
    seen = told_of(want(folder, identity))
    for name in ("jwt.yaml", "jwks.json", "scheduler.rhai"):
        assert f"{INVENTORY}/{name}" in seen["files"]
        (folder / name).unlink()
    (folder / "fleet.conf").write_text(QUEEN.replace(" key-file=keys/big.key", ""))
    found = compare(want(folder, identity), seen)
    deleted = {path for order in found.orders.values() for path in order["delete"]}
    names = ("jwt.yaml", "jwks.json", "scheduler.rhai")
    assert deleted == {f"{KEYS}/cloud.big", *(f"{INVENTORY}/{name}" for name in names)}
    assert "sk-" not in shown(found)
    assert [service["unit"] for order in found.orders.values() for service in order["services"]] == [
        "rbee-queen.service"
    ], "she reads jwt.yaml when she starts"


def test_the_issuer_is_taken_along_with_the_keys_that_it_names(folder: Path, identity: Identity) -> None:
    (folder / "keys" / "ours.json").write_text('{"keys": [1]}')
    (folder / "jwt.yaml").write_text(yaml.safe_dump({**ISSUER, "jwks": "keys/ours.json", "tiers": {"gold": {}}}))
    files = want(folder, identity).files
    assert json.loads(files[f"{INVENTORY}/jwks.json"].content) == {"keys": [1]}
    told = yaml.safe_load(files[f"{INVENTORY}/jwt.yaml"].content)
    assert told["jwks"] == "jwks.json"
    assert (told["issuer"], told["audience"], told["tiers"].keys()) == ("https://id.example/", "rbee", {"gold"})
    (folder / "jwt.yaml").write_text("# ours\n" + yaml.safe_dump(ISSUER))
    files = want(folder, identity).files
    assert files[f"{INVENTORY}/jwt.yaml"].content.startswith(b"# ours")
    assert f"{INVENTORY}/jwks.json" not in files


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ({"issuer": "x"}, "audience"),
        ({**ISSUER, "leeway_s": 1e9}, "leeway_s"),
        ({**ISSUER, "jwks": "http://id.example/jwks.json"}, "https"),
        ({**ISSUER, "jwks": "nowhere.json"}, r"nowhere\.json cannot be read"),
    ],
)
def test_an_issuer_with_which_no_queen_would_start_is_refused_before_anything_is_changed(
    folder: Path, identity: Identity, told: dict[str, Any], complaint: str
) -> None:
    (folder / "jwt.yaml").write_text(yaml.safe_dump(told))
    with pytest.raises(SetupProblem, match=complaint) as refused:
        want(folder, identity)
    assert "jwt.yaml" in str(refused.value)


def test_a_reconciler_keeps_the_keys_that_an_earlier_apply_brought(
    folder: Path, identity: Identity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (folder / "keys" / "big.key").unlink()
    brought = tmp_path / "server-keys"
    brought.mkdir()
    (brought / "cloud.big").write_bytes(SECRET)
    monkeypatch.setattr("rbee.apply.queen_files.SERVER_KEYS", str(brought))
    assert not want(folder, identity).files.keys() & {f"{KEYS}/cloud.big"}
    monkeypatch.setenv("RBEE_IDENTITY", str(tmp_path))
    assert want(folder, identity).files[f"{KEYS}/cloud.big"].content == SECRET


def test_the_queens_own_settings_and_what_they_need_are_taken_along(folder: Path, identity: Identity) -> None:
    (folder / "keys" / "redis").write_text("redis-secret\n")
    (folder / "queen.yaml").write_text(
        "processes: 2\nstate: redis://127.0.0.1:6379/0\nstate_password_file: keys/redis\nkeep_jobs_days: 3\n"
    )
    wanted = want(folder, identity)
    told = yaml.safe_load(wanted.files["/etc/rbee/queen.yaml"].content)
    assert (told["processes"], told["state"], told["keep_jobs_days"]) == (2, "redis://127.0.0.1:6379/0", 3.0)
    password = wanted.files[told["state_password_file"]]
    assert (password.content, password.mode, password.owner) == (b"redis-secret\n", 0o400, "rbee")
    assert queen_extras(read(folder)) == {"redis"}
    seen = told_of(wanted)
    (folder / "keys" / "redis").write_text("another-secret\n")
    found = compare(want(folder, identity), seen)
    assert "a secret" in shown(found)
    assert "another-secret" not in shown(found)
    assert "rbee-queen.service" in {s["unit"] for order in found.orders.values() for s in order["services"]}
    (folder / "queen.yaml").unlink()
    left = yaml.safe_load(want(folder, identity).files["/etc/rbee/queen.yaml"].content) or {}
    assert "state" not in left


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("port: 1", "port"),
        ("proceses: 2", "proceses"),
        ("processes: 2", "needs a place"),
        ("state: redis://a\nstate_password_file: nowhere", "nowhere"),
        ("[", "queen.yaml"),
    ],
)
def test_settings_with_which_no_queen_would_start_are_refused(
    folder: Path, identity: Identity, text: str, complaint: str
) -> None:
    (folder / "queen.yaml").write_text(text)
    with pytest.raises(SetupProblem, match=complaint):
        want(folder, identity)
