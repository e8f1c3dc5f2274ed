"""What differs on a host and what does not: plans are made from plain values, without any host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rbee.apply.desired import UNITS, Desired, ModelFile, certificate_files, desired
from rbee.apply.identity import Identity, identity_of
from rbee.apply.plan import HostPlan, Upload, fingerprint, missing_models, plan
from rbee.inventory import read

INVENTORY = (
    """\
IgnoreUnknown Hive*,Queen*,Worker*,Model*,Gpu*,Region*,Tags,Rbee*
Host one
    HostName 192.0.2.1
    QueenPort 7833
    Worker demo model=rbee-demo
    Worker big model=big gpu=0
    Model big source=https://models.example/big.gguf sha256="""
    + "a" * 64
    + "\n"
)
MODEL = ModelFile(name="big", path="/var/lib/rbee/models/big.gguf", source="https://models.example/big.gguf",
                  sha256="a" * 64)  # fmt: skip
DEVICES = ["/dev/nvidia0", "char-nvidia"]
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return identity_of(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def wanted(identity: Identity, tmp_path: Path) -> Desired:
    return want(identity, tmp_path, INVENTORY)


def want(identity: Identity, folder: Path, text: str) -> Desired:
    (folder / "fleet.conf").write_text(text)
    fleet = read(folder)
    [host] = fleet.hosts
    models = [MODEL] if "model=big" in text else []
    return desired(fleet, host, identity, {}, seen_certificate="its own", release="r1", models=models, devices=DEVICES)


@pytest.fixture
def seen(wanted: Desired) -> dict[str, Any]:
    """Return what a host tells that is as it should be."""
    state = {"ActiveState": "active", "SubState": "running", "UnitFileState": "enabled", "NeedDaemonReload": "no"}
    units = [path.removeprefix(f"{UNITS}/") for path in wanted.files if path.startswith(UNITS)]
    return {
        "files": {
            path: {"sha256": file.sha256, "mode": file.mode, "uid": 0 if file.owner == "root" else 990}
            | ({} if file.secret else {"text": file.content.decode()})
            for path, file in wanted.files.items()
        },
        "folders": {path: list(way) for path, way in wanted.folders.items()},
        "units": {unit: {"Id": unit, **state} for unit in units},
        "users": {wanted.run_as: 990},
        "records": {f"{service.unit}.json": {"hash": service.hash} for service in wanted.services},
        "models": {"big.gguf": {"size_bytes": 5, "sha256": "a" * 64}},
        "layers": [], "releases": ["r1"], "current": "r1", "certificate": "its own",
    }  # fmt: skip


def compare(wanted: Desired, seen: dict[str, Any]) -> HostPlan:
    uploads = [
        Upload(name=model.name, path=model.path, sha256=model.sha256, size_bytes=7, source=model.source)
        for model in missing_models(wanted.models, seen)
    ]
    return plan(wanted, seen, packages=None, uploads=uploads, audit={"who": "me"})


def words(made: HostPlan) -> list[str]:
    return [f"{change.sign} {change.subject}" for change in made.changes]


def test_a_host_that_is_as_it_should_be_has_nothing_to_do(wanted: Desired, seen: dict[str, Any]) -> None:
    made = compare(wanted, seen)
    assert made.is_empty
    assert made.orders == {}


def unit(name: str, **state: str) -> Edit:
    return lambda seen: seen["units"][name].update(state)


def file(path: str, **facts: Any) -> Edit:
    return lambda seen: seen["files"][path].update(facts)


def renew_certificate(seen: dict[str, Any]) -> None:
    for name, record in seen["records"].items():
        if "queen" not in name:
            record["hash"] = "0"


WORKER = "rbee-worker@demo.service"
DRIFT: dict[str, tuple[Edit, list[str], str]] = {
    "stopped": (unit(WORKER, ActiveState="inactive", SubState="dead"), ["~ worker demo"], "it is stopped"),
    "failed": (
        unit(WORKER, ActiveState="failed", SubState="failed", Result="oom-kill"), ["~ worker demo"],
        "it failed (oom-kill)",
    ),
    "crash loop": (
        unit(WORKER, ActiveState="activating", SubState="auto-restart", NRestarts="7"), ["~ worker demo"],
        "it crashes and is started over and over (7 times)",
    ),
    "not enabled": (unit("rbee-hive.service", UnitFileState="disabled"), ["~ hive"], "it is not enabled"),
    "no socket": (
        unit("rbee-worker@demo.socket", ActiveState="inactive"), ["~ worker demo"], "its socket is not active",
    ),
    "unit edited": (
        file(f"{UNITS}/rbee-queen.service", sha256="0" * 64, text="mine\n"), ["~ queen"], "rbee-queen.service differs",
    ),
    "settings of another mode": (file("/etc/rbee/hive.yaml", mode=0o666), ["~ hive"], "hive.yaml differs"),
    "token of another owner": (file("/etc/rbee/worker-tokens/demo", uid=1000), ["~ worker demo"], "demo differs"),
    "older settings still run": (
        lambda seen: seen["records"][f"{WORKER}.json"].update(hash="0"), ["~ worker demo"],
        "it runs with older settings",
    ),
    "another release": (lambda seen: seen.update(current="r0"), ["~ rbee", "~ queen", "~ hive"], "a new release"),
    "another certificate": (
        renew_certificate, ["~ hive", "~ worker demo", "~ worker big"], "it runs with older settings",
    ),
    "target stopped": (unit("rbee.target", ActiveState="inactive"), ["~ base"], ""),
    "an open folder": (lambda seen: seen["folders"].update({"/etc/rbee": [0o777, "root"]}), ["~ base"], ""),
    "a model that rotted": (lambda seen: seen["models"]["big.gguf"].update(sha256="b" * 64), ["~ model big"], ""),
}  # fmt: skip


@pytest.mark.parametrize("case", DRIFT)
def test_drift_is_named(wanted: Desired, seen: dict[str, Any], case: str) -> None:
    edit, expected, reason = DRIFT[case]
    edit(seen)
    made = compare(wanted, seen)
    assert words(made) == expected
    assert all(not reason or reason in change.reasons for change in made.changes if change.subject != "rbee")


def test_a_worker_that_loads_is_left_alone(wanted: Desired, seen: dict[str, Any]) -> None:
    seen["units"][WORKER].update(ActiveState="activating", SubState="start")
    assert compare(wanted, seen).is_empty


def test_an_upgrade_restarts_no_worker(wanted: Desired, seen: dict[str, Any]) -> None:
    seen["current"] = "r0"
    made = compare(wanted, seen)
    restarted = [service["unit"] for order in made.orders.values() for service in order["services"]]
    assert restarted == ["rbee-queen.service", "rbee-hive.service"]
    assert [s["release_before"] for order in made.orders.values() for s in order["services"]] == ["r0", "r0"]


def test_a_worker_that_leaves_is_drained_stopped_and_pruned(
    identity: Identity, tmp_path: Path, seen: dict[str, Any]
) -> None:
    wanted = want(identity, tmp_path, "".join(line for line in INVENTORY.splitlines(True) if "big" not in line))
    made = compare(wanted, seen)
    assert words(made) == ["~ base", "~ hive", "- worker big"]
    order = made.orders["worker"]
    assert order["stop"] == ["rbee-worker@big.socket", "rbee-worker@big.service"]
    assert order["draining"][0]["door"]["port"] == 8002
    assert set(order["delete"]) == {
        f"{UNITS}/rbee-worker@big.service", f"{UNITS}/rbee-worker@big.socket",
        "/etc/rbee/workers/big.yaml", "/etc/rbee/worker-tokens/big",
    }  # fmt: skip
    assert (made.units_before, made.units_removed, made.prunes_most) == (2, 1, False)


def test_more_than_half_of_the_workers_is_most(identity: Identity, tmp_path: Path, seen: dict[str, Any]) -> None:
    wanted = want(identity, tmp_path, "".join(line for line in INVENTORY.splitlines(True)[:4]))
    assert compare(wanted, seen).prunes_most


def test_a_secret_is_in_no_change(wanted: Desired, seen: dict[str, Any], identity: Identity) -> None:
    before = copy.deepcopy(seen)
    for path in ("/etc/rbee/secrets/hive-token", "/etc/rbee/worker-tokens/demo", "/etc/rbee/secrets/fleet.key"):
        seen["files"][path]["sha256"] = "0" * 64
    made = compare(wanted, seen)
    shown = msgspec.json.encode(made.changes).decode()
    assert "@@ a secret @@" in shown
    for secret in (identity.secret, identity.hive_token("one"), identity.worker_token("one", "demo")):
        assert secret not in shown
    assert fingerprint(before) != fingerprint(seen)


def test_an_accelerator_is_given_to_the_worker_that_asks_for_it_alone(wanted: Desired) -> None:
    units = {name: wanted.files[f"{UNITS}/rbee-worker@{name}.service"].content.decode() for name in ("demo", "big")}
    assert "PrivateDevices=yes" in units["demo"]
    assert "DeviceAllow=/dev/nvidia0 rw" in units["big"]


def test_no_unit_names_a_release_or_a_secret(wanted: Desired, identity: Identity) -> None:
    for path, file in wanted.files.items():
        if path.startswith(UNITS):
            text = file.content.decode()
            assert "r1" not in text.replace("worker1", "")
            assert identity.secret not in text
            assert "[X-Rbee]" in text


def test_a_new_certificate_is_another_hash_of_what_shows_it(identity: Identity, tmp_path: Path) -> None:
    (tmp_path / "fleet.conf").write_text(INVENTORY)
    fleet = read(tmp_path)
    made = [
        desired(
            fleet, fleet.hosts[0], identity, certificate_files(pem, "key"), seen_certificate="", release="r1",
            models=[MODEL], devices=[],
        )
        for pem in ("one", "two")
    ]  # fmt: skip
    hashes = [{service.unit: service.hash for service in one.services} for one in made]
    assert {unit for unit in hashes[0] if hashes[0][unit] != hashes[1][unit]} == {
        "rbee-hive.service", "rbee-worker@demo.service", "rbee-worker@big.service",
    }  # fmt: skip
