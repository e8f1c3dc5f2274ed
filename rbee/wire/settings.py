"""The YAML files that `rbee apply` leaves under /etc/rbee, for hive, queen and workers to read.

A relative path of a secret is looked up in the folder of the unit's credentials ($CREDENTIALS_DIRECTORY,
systemd.exec(5)); every other path is absolute.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from rbee.errors import SetupProblem
from rbee.wire.fleet import Count, Name, WorkerName

T = TypeVar("T", bound=Struct)
Days = Annotated[float, Meta(gt=0, le=36_500)]
Port = Annotated[int, Meta(ge=1, le=65535)]


class Tls(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PEM files: this program's certificate and key, and the fleet's own authority."""

    certificate: str
    key: str
    authority: str


class DeclaredModel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model file that `apply` placed on this host."""

    name: Name
    path: str
    sha256: str = ""


class HiveSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`/etc/rbee/hive.yaml`."""

    name: str
    host: str = "0.0.0.0"
    port: Port = 7835
    token_file: str
    tls: Tls | None = None
    models: list[DeclaredModel] = []
    workers: str = "/etc/rbee/workers"
    """The folder of the declared workers' settings, each `NAME.yaml`; it is watched."""
    worker_tokens: str = "/etc/rbee/worker-tokens"
    """A folder with each declared worker's token in a file of its name."""
    authority: str = ""
    """The fleet's authority, with which the hive checks its workers' certificates."""


class WorkerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`/etc/rbee/workers/NAME.yaml`: one declared worker, which systemd runs."""

    name: WorkerName
    model: str
    path: str = ""
    backend: str = ""
    host: str = "0.0.0.0"
    port: Port
    token_file: str = "token"
    tls: Tls | None = None
    device: str = "cpu"
    gpus: list[Annotated[int, Meta(ge=0, le=255)]] = []
    context_tokens: Count = 0
    slots: Count = 0
    threads: Count = 0
    pin: bool = False
    idle_s: float = 0.0
    options: dict[str, str] = {}


class QueenSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`/etc/rbee/queen.yaml`."""

    host: str = "0.0.0.0"
    port: Port = 7833
    inventory: str = "/etc/rbee/inventory"
    identity: str = ""
    """The folder with `fleet.key` and `ca.crt`, by which hives know this queen and she knows them."""
    gitops: str = ""
    """The reconciler's folder, with its `status.json`; a file `sync` made there wakes it."""
    require_key: bool = False
    """Ask for a key on the loopback address too; from anywhere else one is always needed."""
    keep_jobs_days: Days = 30.0
    """How long it can be asked what became of a job."""
    keep_results_days: Days = 7.0
    """How long the answers of jobs and batches are kept, and the files that clients sent."""
    keep_usage_days: Days = 400.0
    """How long the tokens that each key used are kept."""
    platform: bool = False
    """Take the routing script from the operator's API only; the inventory's is not read."""
    log_format: Literal["text", "json"] = "text"
    log_jobs: bool = False
    """Log a record for each job at its end."""
    otlp_endpoint: str = ""
    """Where traces of jobs go, by OTLP over HTTP; empty: nowhere, unless $OTEL_EXPORTER_OTLP_ENDPOINT says so."""
    processes: Annotated[int, Meta(ge=1, le=64)] = 1
    """How many server processes there are; more than one need `state`."""
    state: str = ""
    """The address of the Redis in which server processes and queens share their live state: redis://HOST:PORT/DB."""
    state_password_file: str = ""
    """A private file with the password of that Redis."""
    advertise: str = ""
    """The address at which other queens reach this one: http://HOST:PORT."""


class GitopsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`/etc/rbee/gitops.yaml`: what the reconciler follows."""

    repository: str
    branch: str = "main"
    path: str = "inventory"
    interval_s: float = 60.0
    drift_interval_s: float = 600.0
    heal: bool = True
    require_signed: bool = False
    folder: str = "/var/lib/rbee/gitops"
    identity: str = "."
    """The folder with `fleet.key`, `ca.crt` and `ca.key`."""
    ssh_key: str = ""
    """The private key for hosts and repository; empty: the user's own."""
    known_hosts: str = "/etc/rbee/inventory/known_hosts"
    allowed_signers: str = "/etc/rbee/inventory/allowed_signers"


def read_settings(path: Path, type_: type[T], *, hint: str = "rbee apply writes this file") -> T:
    """Read and check one file. Raises: SetupProblem, with the file, what is wrong in it, and the hint."""
    import yaml

    try:
        value = yaml.load(path.read_bytes(), yaml.CSafeLoader)
        return msgspec.convert(value, type_)
    except OSError as problem:
        raise SetupProblem(f"Cannot read {path} ({problem.strerror})") from None
    except (yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as problem:
        raise SetupProblem(f"{path}: {' '.join(str(problem).split())}", hint=hint) from None


def dump_settings(value: Struct) -> str:
    """Return the YAML text of settings; a value that is the default is left out."""
    import yaml

    plain = msgspec.to_builtins(value)
    defaults = {field.name: msgspec.to_builtins(field.default) for field in msgspec.structs.fields(type(value))
                if field.default is not msgspec.NODEFAULT}  # fmt: skip
    kept = {name: item for name, item in plain.items() if name not in defaults or item != defaults[name]}
    text: str = yaml.safe_dump(kept, sort_keys=False, default_flow_style=False, allow_unicode=True)
    return text


def secret_path(path: str) -> Path:
    """Return where a secret's file lies: relative ones are in the unit's credentials folder."""
    return Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / path
