"""What a host should have, as plain values: files, services and models. Nothing here looks at a host or a clock."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from rbee.apply.identity import Identity
from rbee.apply.templates import render
from rbee.inventory.fleet import Fleet, Gitops, Host, WorkerLine
from rbee.inventory.write import inventory_text
from rbee.wire.settings import (
    DeclaredModel,
    GitopsSettings,
    HiveSettings,
    QueenSettings,
    Tls,
    WorkerSettings,
    dump_settings,
)

ETC, LIB, OPT, UNITS = "/etc/rbee", "/var/lib/rbee", "/opt/rbee", "/etc/systemd/system"
SECRETS, TOKENS, MODELS = f"{ETC}/secrets", f"{ETC}/worker-tokens", f"{LIB}/models"
SERVER_KEYS, INVENTORY = f"{ETC}/server-keys", f"{ETC}/inventory"
GITOPS = f"{LIB}/gitops"
START_LIMIT_S = 600.0
SERVICE_LIMIT_S = 60.0
HEALTH_LIMIT_S = 60.0
DRAIN_LIMIT_S = 30.0
CREDENTIALS = Tls(certificate="host.crt", key="host.key", authority="ca.crt")
PUBLIC, PRIVATE = 0o644, 0o600
BASE_UNITS = ("rbee.target", "rbee-lease.timer", "rbee-lease.service")


class File(Struct, frozen=True, kw_only=True):
    """One file of rbee's own on a host."""

    content: bytes
    mode: int = PUBLIC
    owner: str = "root"
    secret: bool = False

    @property
    def sha256(self) -> str:
        """The content's SHA-256, as the host reports it."""
        return hashlib.sha256(self.content).hexdigest()


class Service(Struct, frozen=True, kw_only=True):
    """One unit that should run. `hash` is over its files: a unit that was started from another hash is restarted."""

    role: str
    """hive, queen, worker or gitops."""
    unit: str
    name: str
    files: list[str]
    hash: str
    socket: str = ""
    port: int = 0
    tls: bool = True
    token: str = ""
    model: str = ""
    detail: str = ""
    gpus: list[int] = []
    limit_s: float = SERVICE_LIMIT_S
    follows_release: bool = True
    """Whether a new release restarts it. Workers keep theirs, so that no model is loaded again."""


class ModelFile(Struct, frozen=True, kw_only=True):
    """One model file that should lie on the host. `source` is `file:PATH` or `https://…`."""

    name: str
    path: str
    source: str
    sha256: str
    size_bytes: int = 0

    @property
    def file_name(self) -> str:
        """Its name in the models folder."""
        return self.path.rpartition("/")[2]


class QueenFiles(Struct, frozen=True, kw_only=True):
    """What a queen needs that lies beside the inventory: who signs tokens, and the keys of servers.

    `issuer` is `jwt.yaml` and `jwks` the issuer's public keys where they are a file; `server_keys` are the contents of
    the `key-file=` of Worker lines that the controller has, by path: another one lies on the queen's host already.
    `settings` are those of `queen.yaml`, and `state_password` the content of the file that it names for its Redis.
    """

    settings: QueenSettings = QueenSettings()
    state_password: bytes = b""
    issuer: bytes = b""
    jwks: bytes = b""
    server_keys: dict[str, bytes] = {}


NO_QUEEN_FILES = QueenFiles()


class Desired(Struct, frozen=True, kw_only=True):
    """Everything that one host should have."""

    host: str
    run_as: str
    release: str
    """The id of the release that `/opt/rbee/current` should name."""
    folders: dict[str, tuple[int, str]]
    files: dict[str, File]
    services: list[Service]
    targets: list[str]
    """Units that should be enabled and active but are no program: rbee.target."""
    models: list[ModelFile]
    authority: str = ""

    def service(self, unit: str) -> Service | None:
        """Return the service of a unit, or None."""
        return next((service for service in self.services if service.unit == unit), None)


def desired(
    fleet: Fleet,
    host: Host,
    identity: Identity,
    certificate: Mapping[str, File],
    *,
    seen_certificate: str,
    release: str,
    models: list[ModelFile],
    devices: list[str],
    gitops_secrets: Mapping[str, bytes] = {},
    queen_files: QueenFiles = NO_QUEEN_FILES,
) -> Desired:
    """Return what `host` should have.

    `certificate` are the host's certificate and key, by path, when a new one is due, and `seen_certificate` what it
    has; `devices` its accelerators' nodes as it reported them; `models` those of its workers that are files;
    `gitops_secrets` what its reconciler needs, by file name; `queen_files` what its queen needs.
    """
    files = {**_base(identity), **certificate}
    services = []
    if host.queen_port:
        services.append(_queen(fleet, host, identity, queen_files, files))
    services.append(_hive(host, identity, models, files))
    paths = {model.name: model.path for model in models}
    for line in host.workers:
        if not line.url:
            services.append(_worker(host, line, identity, paths, devices, files))
    if host.gitops:
        # The last: when it changes, the reconciler that applies this is restarted by it.
        services.append(_gitops(fleet, host, host.gitops, gitops_secrets, files))
    shown = certificate[f"{SECRETS}/host.crt"].content if certificate else seen_certificate.encode()
    return Desired(
        host=host.name,
        run_as=host.run_as,
        release=release,
        folders=folders(host),
        files=files,
        services=[_with_what_it_loads(service, shown, models) for service in services],
        targets=["rbee.target"],
        models=models,
        authority=identity.authority,
    )


def _with_what_it_loads(service: Service, certificate: bytes, models: list[ModelFile]) -> Service:
    """Return a service whose hash also knows what it reads only when it starts: its certificate and its model."""
    if service.role not in ("hive", "worker"):
        return service
    loaded = [model.sha256 for model in models if service.role == "worker" and model.name == service.model]
    text = "\0".join([service.hash, hashlib.sha256(certificate).hexdigest(), *loaded])
    return msgspec.structs.replace(service, hash=hashlib.sha256(text.encode()).hexdigest()[:32])


def folders(host: Host) -> dict[str, tuple[int, str]]:
    """Return the folders that a host should have, with their mode and owner."""
    found = {
        ETC: (0o755, "root"),
        f"{ETC}/workers": (0o755, "root"),
        SECRETS: (0o700, "root"),
        TOKENS: (0o700, host.run_as),
        LIB: (0o755, "root"),
        MODELS: (0o755, "root"),
        f"{LIB}/records": (0o755, "root"),
        f"{LIB}/hive": (0o700, host.run_as),
        OPT: (0o755, "root"),
    }
    if host.queen_port:
        found |= {INVENTORY: (0o755, "root"), f"{LIB}/queen": (0o700, host.run_as), SERVER_KEYS: (0o700, host.run_as)}
    if host.gitops:
        found[GITOPS] = (0o700, host.run_as)
    return found


def _base(identity: Identity) -> dict[str, File]:
    """The files that belong to no service: what binds the units together, and the fleet's authority."""
    files = {
        f"{UNITS}/{name}": _text(render(name)) for name in ("rbee.target", "rbee-lease.timer", "rbee-lease.service")
    }
    files[f"{SECRETS}/ca.crt"] = File(content=identity.authority.encode(), mode=PRIVATE, secret=True)
    return files


def _hive(host: Host, identity: Identity, models: list[ModelFile], files: dict[str, File]) -> Service:
    settings = HiveSettings(
        name=host.name,
        port=host.hive_port,
        token_file="hive-token",
        tls=CREDENTIALS,
        authority="ca.crt",
        models=[DeclaredModel(name=model.name, path=model.path, sha256=model.sha256) for model in models],
    )
    unit, token = "rbee-hive.service", identity.hive_token(host.name)
    own = {
        f"{UNITS}/{unit}": _text(render(unit, run_as=host.run_as)),
        f"{ETC}/hive.yaml": _text(dump_settings(settings)),
        f"{SECRETS}/hive-token": _secret(token),
    }
    files |= own
    return Service(
        role="hive", unit=unit, name="hive", files=list(own), hash=digest_of(own), port=host.hive_port, token=token,
        detail=f"port {host.hive_port}",
    )  # fmt: skip


def _queen(fleet: Fleet, host: Host, identity: Identity, told: QueenFiles, files: dict[str, File]) -> Service:
    unit = "rbee-queen.service"
    password = f"{SERVER_KEYS}/state-password" if told.state_password else ""
    settings = msgspec.structs.replace(
        told.settings, port=host.queen_port, gitops=GITOPS if host.gitops else "", state_password_file=password
    )
    own = {
        f"{UNITS}/{unit}": _text(render(unit, run_as=host.run_as)),
        f"{ETC}/queen.yaml": _text(dump_settings(settings)),
        f"{SECRETS}/fleet.key": _secret(identity.secret),
    }
    if password:
        own[password] = File(content=told.state_password, mode=0o400, owner=host.run_as, secret=True)
    if told.issuer:
        own[f"{INVENTORY}/jwt.yaml"] = File(content=told.issuer)
    # The queen reads these live: a change of them is no reason to restart her.
    keyed, keys = _server_keys(fleet, host, told.server_keys)
    live = {f"{INVENTORY}/fleet.conf": _text(inventory_text(keyed)), **keys}
    if told.jwks:
        live[f"{INVENTORY}/jwks.json"] = File(content=told.jwks)
    script = fleet.folder / "scheduler.rhai"
    if script.is_file():
        live[f"{INVENTORY}/scheduler.rhai"] = File(content=script.read_bytes())
    files |= own | live
    return Service(
        role="queen", unit=unit, name="queen", files=list(own), hash=digest_of(own), port=host.queen_port, tls=False,
        detail=f"port {host.queen_port}",
    )  # fmt: skip


def _server_keys(fleet: Fleet, queen: Host, contents: Mapping[str, bytes]) -> tuple[Fleet, dict[str, File]]:
    """Return the fleet with the keys of its servers where the queen's host has them, and their files there.

    They are no credentials of her unit: systemd reads those when it starts, and a new key must count at once.
    """
    files, hosts = {}, []
    for host in fleet.hosts:
        lines = []
        for line in host.workers:
            if line.key_file in contents:
                path = f"{SERVER_KEYS}/{host.name}.{line.name}"
                files[path] = File(content=contents[line.key_file], mode=0o400, owner=queen.run_as, secret=True)
                line = msgspec.structs.replace(line, key_file=path)
            lines.append(line)
        hosts.append(msgspec.structs.replace(host, workers=lines))
    return msgspec.structs.replace(fleet, hosts=hosts), files


def _worker(
    host: Host, line: WorkerLine, identity: Identity, paths: dict[str, str], devices: list[str], files: dict[str, File]
) -> Service:
    unit, socket = f"rbee-worker@{line.name}.service", f"rbee-worker@{line.name}.socket"
    token, limit_s = identity.worker_token(host.name, line.name), line.start_limit_s or START_LIMIT_S
    on_device = line.device not in ("", "cpu") or bool(line.gpus)
    settings = WorkerSettings(
        name=line.name,
        model=line.model or line.backend,
        path=paths.get(line.model, ""),
        backend=line.backend,
        port=line.port,
        tls=CREDENTIALS,
        device=line.device or "cpu",
        gpus=line.gpus,
        context_tokens=line.context_tokens,
        slots=line.slots,
        threads=line.threads,
        pin=line.pin,
        idle_s=line.idle_s,
        options=line.options,
    )
    variables = {
        "name": line.name,
        "port": line.port,
        "start_limit_s": round(limit_s),
        "memory_max_bytes": line.memory_bytes,
        "writable_executable": False,
        "devices": devices if on_device else [],
    }
    own = {
        f"{UNITS}/{unit}": _text(render("rbee-worker@.service", **variables)),
        f"{UNITS}/{socket}": _text(render("rbee-worker@.socket", **variables)),
        f"{ETC}/workers/{line.name}.yaml": _text(dump_settings(settings)),
        f"{TOKENS}/{line.name}": File(content=token.encode() + b"\n", mode=0o400, owner=host.run_as, secret=True),
    }
    files |= own
    return Service(
        role="worker", unit=unit, name=line.name, files=list(own), hash=digest_of(own), socket=socket, port=line.port,
        token=token, model=settings.model, gpus=line.gpus, limit_s=limit_s, follows_release=False,
        detail=f"{settings.model} on {settings.device}, port {line.port}",
    )  # fmt: skip


def _gitops(fleet: Fleet, host: Host, line: Gitops, secrets: Mapping[str, bytes], files: dict[str, File]) -> Service:
    unit = "rbee-gitops.service"
    settings = GitopsSettings(
        repository=line.repository,
        branch=line.branch,
        path=line.path,
        interval_s=line.interval_s,
        require_signed=line.require_signed,
        ssh_key="gitops-key" if line.key_file else "",
    )
    own = {
        f"{UNITS}/{unit}": _text(render(unit, run_as=host.run_as, secrets=sorted(secrets))),
        f"{ETC}/gitops.yaml": _text(dump_settings(settings)),
        **{f"{SECRETS}/{name}": File(content=data, mode=PRIVATE, secret=True) for name, data in secrets.items()},
    }
    # The reconciler reads these at each look.
    for name in ("known_hosts", "allowed_signers"):
        path = fleet.folder / name
        if path.is_file():
            files[f"{INVENTORY}/{name}"] = File(content=path.read_bytes())
    files |= own
    return Service(
        role="gitops", unit=unit, name="gitops", files=list(own), hash=digest_of(own),
        detail=f"{line.branch} of {line.repository}",
    )  # fmt: skip


def certificate_files(certificate: str, key: str) -> dict[str, File]:
    """Return the files of a host's certificate."""
    return {
        f"{SECRETS}/host.crt": File(content=certificate.encode(), mode=PRIVATE, secret=True),
        f"{SECRETS}/host.key": File(content=key.encode(), mode=PRIVATE, secret=True),
    }


def model_path(name: str, source: str) -> str:
    """Return where a model file lies on a host: its declared name, its source's ending."""
    suffix = Path(source.rpartition("/")[2].rpartition("?")[0] or source.rpartition("/")[2]).suffix
    return f"{MODELS}/{name}{suffix if suffix in ('.gguf', '.bin', '.ggml', '.safetensors') else ''}"


def _text(text: str) -> File:
    return File(content=text.encode())


def _secret(text: str) -> File:
    return File(content=text.encode() + b"\n", mode=PRIVATE, secret=True)


def digest_of(files: Mapping[str, File]) -> str:
    """Return one hash over a service's files, their paths and rights."""
    digest = hashlib.sha256()
    for path, file in sorted(files.items()):
        digest.update(f"{path}\0{file.mode:o}\0{file.owner}\0{file.sha256}\0".encode())
    return digest.hexdigest()[:32]
