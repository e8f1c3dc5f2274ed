"""From one host's session to its plan: what it has, what it should have, and where its models come from."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rbee.apply import release as releases
from rbee.apply.desired import (
    NO_QUEEN_FILES,
    Desired,
    File,
    ModelFile,
    certificate_files,
    desired,
    folders,
    model_path,
)
from rbee.apply.identity import AUTHORITY_KEY, Identity
from rbee.apply.plan import HostPlan, Packages, Upload, missing_models, plan
from rbee.apply.queen_files import queen_extras, queen_files
from rbee.apply.release import Release, Target
from rbee.apply.ssh import KEY_VARIABLE, Session
from rbee.default_engine import DEFAULT_ENGINE
from rbee.errors import HostFailed, RbeeError
from rbee.inventory.fleet import Fleet, Host, ModelLine
from rbee.paths import BUILT_IN_MODEL, cache_dir, private, write_private

PROGRAMS = {"git": "git", "ssh": "openssh-client"}
"""What a host with a reconciler must have, and the package that brings it."""
SPARE_BYTES = 64 * 1024 * 1024
"""What must stay free on a host's disk after everything was sent."""


@dataclass
class Survey:
    """What all hosts of one apply share. Used by one thread a host."""

    fleet: Fleet
    identity: Identity
    revision: str
    state: str = ""
    """What this apply's states are kept as; the hosts' logs name it too."""
    what: str = "apply"
    seen: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """What each host was observed to have."""
    wanted: dict[str, Desired] = field(default_factory=dict)
    _building: threading.Lock = field(default_factory=threading.Lock)
    _releases: dict[tuple[Any, ...], Release] = field(default_factory=dict)

    def observe(self, host: Host, session: Session) -> None:
        """Have the agent tell what the host has. Raises: HostProblem."""
        self.seen[host.name] = session.ask(
            "observe", users=[host.run_as], folders=list(folders(host)), ports=_ports(host), programs=list(PROGRAMS)
        )

    def plan(self, host: Host) -> HostPlan:
        """Return what would be done on an observed host. Raises: HostFailed, SetupProblem."""
        seen = self.seen[host.name]
        if not seen["systemd"]:
            raise HostFailed(host.name, "it does not run systemd, which keeps rbee's services there")
        if host.gitops:
            _check_programs(host, seen)
        release = self.release(host, seen)
        models = [self._model(host, line) for line in _models(host)]
        wanted = desired(
            self.fleet,
            host,
            self.identity,
            self._certificate(host, seen),
            seen_certificate=seen["certificate"],
            release=release.id,
            models=models,
            devices=list(seen["device_names"]),
            gitops_secrets=self._gitops_secrets(host),
            queen_files=queen_files(self.fleet) if host.queen_port else NO_QUEEN_FILES,
        )
        self.wanted[host.name] = wanted
        return self.compare(host, wanted, release)

    def compare(self, host: Host, wanted: Desired, release: Release | None) -> HostPlan:
        """Return what leads from the observed state to `wanted`. Raises: HostFailed when its disk is too small."""
        seen = self.seen[host.name]
        packages = None
        if release is not None and release.id not in seen["releases"]:
            lacking = [layer.sha256 for layer in release.layers if layer.sha256 not in seen["layers"]]
            packages = Packages(release=release, lacking=lacking)
        uploads = [self._upload(host, model) for model in missing_models(wanted.models, seen)]
        result = plan(wanted, seen, packages=packages, uploads=uploads, audit=self.audit(host))
        _check_space(host, seen, packages, uploads)
        _check_ports(host, seen, wanted)
        return result

    def audit(self, host: Host) -> dict[str, Any]:
        """Return who applies what, for the host's log."""
        return {
            "who": f"{getpass.getuser()}@{socket.gethostname()}",
            "what": self.what,
            "revision": self.revision,
            "state": self.state,
            "inventory": self.fleet.sha256,
            "host": host.name,
        }

    def release(self, host: Host, seen: Mapping[str, Any]) -> Release:
        """Return the release for a host; hosts of one kind share it. Raises: SetupProblem, PluginProblem."""
        roles = {"hive"} | ({"queen"} if host.queen_port else set())
        if host.queen_port:
            roles |= queen_extras(self.fleet)
        served = [host]
        if host.gitops:  # from there the others get theirs
            roles.add("apply")
            served = self.fleet.hosts
        lines = [line for one in served for line in one.workers if not line.url]
        backends = {line.backend or DEFAULT_ENGINE for line in lines} or {DEFAULT_ENGINE}
        target = Target(
            python=".".join(str(part) for part in seen["python"][:2]),
            machine=seen["machine"],
            libc=seen["libc"],
            interpreter=seen["executable"],
            cpu_flags=frozenset(seen["cpu_flags"]),
        )
        key = (frozenset(roles), frozenset(backends), target)
        with self._building:
            if key not in self._releases:
                try:
                    self._releases[key] = releases.build(frozenset(roles), frozenset(backends), target)
                except RbeeError as problem:
                    raise HostFailed(host.name, problem.message, hint=problem.hint) from None
            return self._releases[key]

    def _gitops_secrets(self, host: Host) -> dict[str, bytes]:
        """Return what a reconciler needs beside the queen's own secrets. Raises: HostFailed."""
        if host.gitops is None:
            return {}
        files = {AUTHORITY_KEY: self.identity.folder / AUTHORITY_KEY}
        if host.gitops.key_file:
            # A reconciler that applies has the key at hand, but not the file that the controller took it from.
            files["gitops-key"] = Path(os.environ.get(KEY_VARIABLE) or host.gitops.key_file)
        try:
            return {name: path.read_bytes() for name, path in files.items()}
        except OSError as problem:
            what = f"its reconciler needs {problem.filename}, which cannot be read: {problem.strerror}"
            raise HostFailed(host.name, what, hint=f"key= in {host.gitops.at}") from None

    def _certificate(self, host: Host, seen: Mapping[str, Any]) -> dict[str, File]:
        if self.identity.certifies(host, seen["certificate"]):
            return {}
        return certificate_files(*self.identity.certify(host))

    def _model(self, host: Host, line: ModelLine) -> ModelFile:
        """Raises: HostFailed when the file's content cannot be known."""
        sha256, size = line.sha256.lower(), 0
        if line.source.startswith("file:"):
            path = Path(line.source.removeprefix("file:"))
            try:
                found, size = file_sha256(path)
            except OSError as problem:
                found = ""
                if not sha256:
                    what = f"the model {line.name} ({line.at}) cannot be read: {path}: {problem.strerror}"
                    raise HostFailed(host.name, what) from None
            if sha256 and found and sha256 != found:
                raise HostFailed(
                    host.name, f"{path} has sha256 {found}, but {line.at} says {sha256}", hint="mend either of them"
                )
            sha256 = sha256 or found
        if not sha256:
            raise HostFailed(host.name, f"the model {line.name} needs a sha256= in {line.at}: {line.source}")
        path_there = model_path(line.name, line.source)
        return ModelFile(name=line.name, path=path_there, source=line.source, sha256=sha256, size_bytes=size)

    def _upload(self, host: Host, model: ModelFile) -> Upload:
        """Choose where a model comes from: this machine, then another host, the internet last."""
        source, size = model.source, model.size_bytes
        cached = cache_dir() / "models" / model.sha256
        if not (source.startswith("file:") and size):
            if cached.is_file():
                source, size = f"file:{cached}", cached.stat().st_size
            elif holder := self._holder(host, model.sha256):
                source, size = holder
            elif source.startswith("file:"):
                raise HostFailed(host.name, f"the model {model.name} is neither at {source} nor on another host")
        return Upload(name=model.name, path=model.path, sha256=model.sha256, size_bytes=size, source=source)

    def _holder(self, host: Host, sha256: str) -> tuple[str, int] | None:
        for other, seen in self.seen.items():
            for name, model in seen["models"].items():
                if other != host.name and model["sha256"] == sha256:
                    return f"host:{other}:/var/lib/rbee/models/{name}", int(model["size_bytes"])
        return None


def revision_of(folder: Path) -> str:
    """Return the git revision of an inventory folder, `+` behind it when there are changes; else a hash of its files.

    It names an apply in history and audit. It never goes into a unit: each commit would restart every model.
    """
    try:
        git = ["git", "-C", str(folder)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        if head.returncode == 0:
            state = subprocess.run(
                [*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, timeout=10
            )
            return head.stdout.strip() + ("+" if state.stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        pass
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.conf"), *folder.glob("*.rhai")]):
        digest.update(path.read_bytes())
    return f"files-{digest.hexdigest()[:12]}"


def file_sha256(path: Path) -> tuple[str, int]:
    """Return a file's SHA-256 and size; a large one that did not change is not read again. Raises: OSError."""
    status = path.stat()
    seal = f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}"
    note = cache_dir() / "sha256" / hashlib.sha256(seal.encode()).hexdigest()
    try:
        return json.loads(note.read_text()), status.st_size
    except (OSError, ValueError):
        pass
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    write_private(private(note.parent) / note.name, json.dumps(digest).encode())
    return digest, status.st_size


def _ports(host: Host) -> list[int]:
    ports = [host.hive_port, *(line.port for line in host.workers if not line.url)]
    return [*ports, host.queen_port] if host.queen_port else ports


def _models(host: Host) -> list[ModelLine]:
    """Return the models that this host's own workers need as files."""
    named = {line.model for line in host.workers if not line.url}
    return [model for model in host.models if model.name in named and model.name != BUILT_IN_MODEL and model.source]


def _check_programs(host: Host, seen: Mapping[str, Any]) -> None:
    """Raise: HostFailed when a host with a reconciler lacks one of the programs that it works with."""
    missing = [PROGRAMS[name] for name in PROGRAMS if name not in seen["programs"]]
    if missing:
        raise HostFailed(
            host.name,
            f"RbeeGitops needs {' and '.join(missing)} there",
            hint=f"rbee ssh {host.name} -- apt-get install {' '.join(missing)}",
        )


def _check_space(host: Host, seen: Mapping[str, Any], packages: Packages | None, uploads: list[Upload]) -> None:
    layers = packages.release.layers if packages else ()
    needed = sum(layer.bytes for layer in layers if packages and layer.sha256 in packages.lacking)
    needed += sum(upload.size_bytes for upload in uploads)
    free = seen["disk_free_bytes"]
    if needed and needed + SPARE_BYTES > free:
        raise HostFailed(
            host.name,
            f"{needed / 1e6:.0f} MB have to go there, and its disk has {free / 1e6:.0f} MB free",
            hint=f"make room: rbee ssh {host.name}",
        )


def _check_ports(host: Host, seen: Mapping[str, Any], wanted: Desired) -> None:
    """A port that somebody else listens on is told before anything is changed. Raises: HostFailed."""
    for service in wanted.services:
        if service.port not in seen["busy_ports"]:
            continue
        unit = seen["units"].get(service.socket or service.unit, {})
        if unit.get("ActiveState") not in ("active", "activating", "deactivating") and not _held_by_ours(service, seen):
            raise HostFailed(
                host.name,
                f"port {service.port}, which {service.name} should have, is taken by another program",
                hint=f"rbee ssh {host.name} -- ss -ltnp 'sport = :{service.port}', or another port in {host.at}",
            )


def _held_by_ours(service: Any, seen: Mapping[str, Any]) -> bool:
    """Tell whether one of rbee's own workers, which may be about to leave, listens on the port."""
    for path, file in seen["files"].items():
        active = seen["units"].get(f"rbee-worker@{Path(path).stem}.socket", {}).get("ActiveState") == "active"
        if path.startswith("/etc/rbee/workers/") and active and f"port: {service.port}\n" in file.get("text", ""):
            return True
    return False
