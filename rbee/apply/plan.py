"""The difference between what a host should have and what it has, for people to read and for the agent to carry out."""

from __future__ import annotations

import base64
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

from rbee.apply.desired import DRAIN_LIMIT_S, HEALTH_LIMIT_S, UNITS, Desired, File, ModelFile, Service
from rbee.apply.release import Release

LOADING = ("start", "start-pre", "start-post")
ROLES = ("base", "queen", "hive", "worker")


class Upload(Struct, frozen=True, kw_only=True):
    """A model file that goes to the host before anything is changed there."""

    name: str
    path: str
    sha256: str
    size_bytes: int
    source: str
    """`file:PATH` on this machine, `host:NAME:PATH` on another host, or `https://…`."""


class Packages(Struct, frozen=True, kw_only=True):
    """The release that the host should have, and which of its layers it lacks."""

    release: Release
    lacking: list[str]

    @property
    def size_bytes(self) -> int:
        """What has to be sent."""
        return sum(layer.packed_bytes for layer in self.release.layers if layer.sha256 in self.lacking)


class Change(Struct, frozen=True, kw_only=True):
    """One line of a plan: `+` made, `~` changed, `-` removed."""

    sign: str
    subject: str
    """What a person calls it: `worker llama`, `hive`, `model llama-3-8b`, `rbee 0.1.0`."""
    detail: str = ""
    reasons: list[str] = []
    diff: list[str] = []
    size_bytes: int = 0
    drains: str = ""
    """The worker whose running jobs are waited for."""


class HostPlan(Struct, frozen=True, kw_only=True):
    """What would be done on one host. Without changes nothing is sent there."""

    host: str
    changes: list[Change] = []
    packages: Packages | None = None
    """None when the host has the release already."""
    uploads: list[Upload] = []
    orders: dict[str, dict[str, Any]] = {}
    """The agent's transaction for each role, in the order of `ROLES`."""
    units_before: int = 0
    units_removed: int = 0
    observed: str = ""
    """A hash of what was observed: a saved plan is refused when it moved."""

    @property
    def is_empty(self) -> bool:
        """True when the host is as it should be."""
        return not self.changes

    @property
    def prunes_most(self) -> bool:
        """True when more than half of the host's workers would go, of at least two."""
        return self.units_removed > 1 and self.units_removed * 2 > self.units_before


def plan(
    wanted: Desired,
    seen: Mapping[str, Any],
    *,
    packages: Packages | None,
    uploads: list[Upload],
    audit: Mapping[str, Any],
) -> HostPlan:
    """Compare `wanted` with what the agent observed (`seen`). Pure: it asks nobody and changes nothing.

    `packages` and `uploads` are what the host lacks; `audit` is what its log will say of this apply.
    """
    comparison = _Comparison(wanted, seen, audit)
    sent = _sent(packages, uploads, seen)
    changes = [*sent, *comparison.base(), *comparison.services(), *comparison.removed()]
    workers = _worker_units(seen["files"])
    return HostPlan(
        host=wanted.host,
        changes=changes,
        packages=packages,
        uploads=uploads,
        orders={role: comparison.orders[role] for role in ROLES if not _is_idle(comparison.orders[role])},
        units_before=len(workers),
        units_removed=sum(1 for unit in workers if wanted.service(unit) is None),
        observed=fingerprint(seen),
    )


def fingerprint(seen: Mapping[str, Any]) -> str:
    """Return a hash of the part of an observation that a plan depends on."""
    import hashlib
    import json

    files = {path: (file["sha256"], file["mode"]) for path, file in seen["files"].items()}
    units = {name: (unit.get("ActiveState"), unit.get("UnitFileState")) for name, unit in seen["units"].items()}
    models = {name: model["sha256"] for name, model in seen["models"].items()}
    hashes = {name: record.get("hash") for name, record in seen["records"].items()}
    text = json.dumps([files, units, models, hashes, seen["current"], seen["layers"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Comparison:
    """One host's comparison: each part adds its changes, and its steps to the role's order."""

    def __init__(self, wanted: Desired, seen: Mapping[str, Any], audit: Mapping[str, Any]) -> None:
        self._wanted = wanted
        self._seen = seen
        self._stopped: set[str] = set()
        self.orders = {role: _order(role, wanted, audit) for role in ROLES}
        self._of_services = {path for service in wanted.services for path in service.files}

    def base(self) -> list[Change]:
        """Users, folders, the release, and the files that belong to no service."""
        wanted, seen, order = self._wanted, self._seen, self.orders["base"]
        reasons = []
        if seen["users"].get(wanted.run_as) is None:
            order["user"] = wanted.run_as
            reasons.append(f"user {wanted.run_as}")
        missing = {path: way for path, way in wanted.folders.items() if seen["folders"].get(path) != [way[0], way[1]]}
        if missing:
            order["folders"] = {path: list(way) for path, way in missing.items()}
            reasons.append(f"folders {', '.join(missing)}")
        changed = self._changed_files(path for path in wanted.files if path not in self._of_services)
        gone = self._gone_files(role_of_workers=False)
        self._write(order, changed, gone)
        order["enable"] = [unit for unit in wanted.targets if not _is_enabled(seen, unit)]
        order["start"] = [unit for unit in wanted.targets if not self._is_up(unit)]
        reasons += [path.rpartition("/")[2] for path in [*changed, *gone]]
        changes = []
        if wanted.release != seen["current"]:
            order["release"] = wanted.release
            sign = "~" if seen["current"] else "+"
            changes.append(Change(sign=sign, subject="rbee", detail=f"release {wanted.release}"))
        reasons += [f"{unit} is stopped" for unit in order["start"] if seen["records"]]
        if reasons or order["enable"] or order["start"]:
            sign = "~" if seen["records"] else "+"
            changes.append(
                Change(
                    sign=sign,
                    subject="base",
                    detail=", ".join(reasons),
                    diff=self._diffs([*changed, *gone]) if sign == "~" else [],
                )
            )
        return changes

    def services(self) -> list[Change]:
        """Every service that should run, in the order in which they are activated."""
        changes = []
        for service in self._wanted.services:
            reasons = self._reasons(service)
            if not reasons:
                continue
            order = self.orders[service.role if service.role in ROLES else ROLES[-1]]
            changed = self._changed_files(service.files)
            self._write(order, changed, [])
            if not _is_enabled(self._seen, service.unit):
                order["enable"].append(service.unit)
            order["services"].append(self._activation(service))
            exists = f"{UNITS}/{service.unit}" in self._seen["files"]
            drains = service.name if exists and service.role == "worker" and self._is_up(service.unit) else ""
            changes.append(
                Change(
                    sign="~" if exists else "+",
                    subject=_subject(service),
                    detail=service.detail,
                    reasons=reasons if exists else [],
                    diff=self._diffs(changed) if exists else [],
                    drains=drains,
                )
            )
        return changes

    def removed(self) -> list[Change]:
        """What rbee owns there and nobody wants: its units stop first, for they may hold a device or a port."""
        changes = []
        order = self.orders["worker"]
        for path in self._seen["files"]:
            unit = path.removeprefix(f"{UNITS}/")
            if unit == path or path in self._wanted.files:
                continue
            order["delete"].append(path)
            order["stop"].append(unit)
            if unit.endswith(".socket"):
                continue
            order["gone"].append(unit)
            name = _worker_name(unit)
            if name:
                order["draining"].append(self._departing(unit, name))
            subject = f"worker {name}" if name else unit.removesuffix(".service").removeprefix("rbee-")
            changes.append(Change(sign="-", subject=subject, drains=name if self._is_up(unit) else ""))
        # A socket first: else its service would be started again by the next connection.
        order["stop"].sort(key=lambda unit: not unit.endswith(".socket"))
        left = self._gone_files(role_of_workers=True)
        order["delete"] += left
        named = {f"/{_worker_name(unit)}" for unit in order["gone"]}
        for path in left:
            if path.removesuffix(".yaml").endswith(tuple(named) or "\0"):
                continue
            changes.append(Change(sign="-", subject=path, diff=_diff(path, self._seen["files"][path], None)))
        return changes

    def _reasons(self, service: Service) -> list[str]:
        """Return why a service must be touched; nothing when it runs as it should."""
        seen = self._seen
        reasons = [f"{path.rpartition('/')[2]} differs" for path in self._changed_files(service.files)]
        record = seen["records"].get(f"{service.unit}.json", {})
        if not reasons and record.get("hash") != service.hash:
            reasons.append("it runs with older settings" if record else "it was never started by apply")
        if service.follows_release and seen["current"] and seen["current"] != self._wanted.release:
            reasons.append("a new release")
        unit = seen["units"].get(service.unit, {})
        if f"{UNITS}/{service.unit}" in seen["files"]:
            reasons += _unit_reasons(unit)
            if service.socket and not self._is_up(service.socket):
                reasons.append("its socket is not active")
            if not _is_enabled(seen, service.unit):
                reasons.append("it is not enabled")
        return reasons

    def _activation(self, service: Service) -> dict[str, Any]:
        door = {"port": service.port, "tls": service.tls, "token": service.token, "authority": self._wanted.authority}
        health = {**door, "url": f"port {service.port}", "limit_s": HEALTH_LIMIT_S, "model": service.model}
        return {
            "unit": service.unit,
            "socket": service.socket,
            "files": service.files,
            "hash": service.hash,
            "limit_s": service.limit_s,
            "release_before": self._seen["current"] if service.follows_release else "",
            "door": self._old_door(service) if service.role == "worker" else None,
            "drain_s": DRAIN_LIMIT_S if service.role == "worker" else 0,
            "health": health if service.port else None,
        }

    def _old_door(self, service: Service) -> dict[str, Any]:
        """Return where the worker answers at present; its port may be another than it will have."""
        port = _port_of(self._seen, service.name) or service.port
        return {"port": port, "token": service.token, "authority": self._wanted.authority}

    def _departing(self, unit: str, name: str) -> dict[str, Any]:
        door = {"port": _port_of(self._seen, name), "token_of": name, "authority": self._wanted.authority}
        return {"unit": unit, "door": door, "drain_s": DRAIN_LIMIT_S}

    def _changed_files(self, paths: Iterable[str]) -> list[str]:
        found = self._seen["files"]
        return [path for path in paths if not _is_same(self._wanted.files[path], found.get(path), self._seen)]

    def _gone_files(self, *, role_of_workers: bool) -> list[str]:
        """Return files under rbee's own folders that nobody wants, units apart."""
        gone = [
            path for path in self._seen["files"]
            if path not in self._wanted.files and not path.startswith(UNITS) and not _is_certificate(path)
        ]  # fmt: skip
        return [path for path in gone if ("/worker" in path) is role_of_workers]

    def _write(self, order: dict[str, Any], changed: Iterable[str], gone: Iterable[str]) -> None:
        for path in changed:
            file = self._wanted.files[path]
            content = base64.b64encode(file.content).decode()
            order["files"][path] = {"content": content, "mode": file.mode, "owner": file.owner}
        order["delete"] += gone

    def _diffs(self, paths: Iterable[str]) -> list[str]:
        lines: list[str] = []
        for path in paths:
            lines += _diff(path, self._seen["files"].get(path), self._wanted.files.get(path))
        return lines

    def _is_up(self, unit: str) -> bool:
        return bool(self._seen["units"].get(unit, {}).get("ActiveState") in ("active", "activating", "reloading"))


def _order(role: str, wanted: Desired, audit: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "role": role,
        "folders": {},
        "files": {},
        "delete": [],
        "stop": [],
        "draining": [],
        "enable": [],
        "start": [],
        "services": [],
        "gone": [],
        "audit": dict(audit),
    }


def _is_idle(order: Mapping[str, Any]) -> bool:
    return not any(value for name, value in order.items() if name not in ("role", "audit"))


def _unit_reasons(unit: Mapping[str, str]) -> list[str]:
    active, sub = unit.get("ActiveState", ""), unit.get("SubState", "")
    if active == "activating" and sub in LOADING:
        return []  # it loads its model: that is no drift
    if active == "activating":
        return [f"it crashes and is started over and over ({unit.get('NRestarts', '?')} times)"]
    if active == "failed":
        return [f"it failed ({unit.get('Result', 'no reason')})"]
    if active not in ("active", "reloading"):
        return ["it is stopped"]
    return ["systemd has not read its file"] if unit.get("NeedDaemonReload") == "yes" else []


def _is_enabled(seen: Mapping[str, Any], unit: str) -> bool:
    return bool(seen["units"].get(unit, {}).get("UnitFileState") in ("enabled", "static", "alias"))


def _is_same(wanted: File, found: Mapping[str, Any] | None, seen: Mapping[str, Any]) -> bool:
    if found is None or found["sha256"] != wanted.sha256 or found["mode"] != wanted.mode:
        return False
    uid = 0 if wanted.owner == "root" else seen["users"].get(wanted.owner)
    return bool(found["uid"] == uid)


def _is_certificate(path: str) -> bool:
    """The host's certificate stays until a new one is due; then it is among the wanted files."""
    return path.endswith(("/host.crt", "/host.key"))


def _diff(path: str, found: Mapping[str, Any] | None, wanted: File | None) -> list[str]:
    """Return a unified diff; of a secret only that it changes."""
    if (wanted and wanted.secret) or (found and "text" not in found):
        return [f"--- {path}", f"+++ {path}", "@@ a secret @@"]
    before = str(found["text"]).splitlines() if found else []
    after = wanted.content.decode("utf-8", "replace").splitlines() if wanted else []
    return list(difflib.unified_diff(before, after, path if found else "/dev/null", path, n=2, lineterm=""))


def _sent(packages: Packages | None, uploads: Iterable[Upload], seen: Mapping[str, Any]) -> list[Change]:
    changes = []
    if packages and packages.lacking:
        names = [layer.name for layer in packages.release.layers if layer.sha256 in packages.lacking]
        changes.append(Change(sign="+", subject="packages", detail=", ".join(names), size_bytes=packages.size_bytes))
    for upload in uploads:
        sign = "~" if upload.path.rpartition("/")[2] in seen["models"] else "+"
        way, _, rest = upload.source.partition(":")
        where = {"file": "this machine", "host": f"host {rest.partition(':')[0]}"}.get(way, "the internet")
        changes.append(
            Change(sign=sign, subject=f"model {upload.name}", detail=f"from {where}", size_bytes=upload.size_bytes)
        )
    return changes


def missing_models(wanted: Iterable[ModelFile], seen: Mapping[str, Any]) -> list[ModelFile]:
    """Return the models that the host lacks, or has with another content."""
    found = seen["models"]
    return [model for model in wanted if found.get(model.file_name, {}).get("sha256") != model.sha256]


def _subject(service: Service) -> str:
    return f"worker {service.name}" if service.role == "worker" else service.role


def _worker_units(paths: Iterable[str]) -> list[str]:
    units = [path.removeprefix(f"{UNITS}/") for path in paths]
    return [unit for unit in units if unit.endswith(".service") and _worker_name(unit)]


def _worker_name(unit: str) -> str:
    return unit.removeprefix("rbee-worker@").partition(".")[0] if unit.startswith("rbee-worker@") else ""


def _port_of(seen: Mapping[str, Any], worker: str) -> int:
    """Return the port in a worker's settings file as it lies on the host; 0 when it cannot be read."""
    import yaml

    try:
        settings = yaml.safe_load(seen["files"][f"/etc/rbee/workers/{worker}.yaml"]["text"])
        return int(settings["port"])
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        return 0
