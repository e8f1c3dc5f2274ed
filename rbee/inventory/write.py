"""A fleet, written as an inventory file: what the queen's host gets, every value in its place."""

from __future__ import annotations

from rbee.inventory.fleet import Fleet, Host, WorkerLine

HEADER = """\
# What the inventory says, resolved. `rbee apply` writes this file; edit the inventory instead.
IgnoreUnknown Hive*,Queen*,Worker*,Model*,Gpu*,Region*,Tags,Rbee*
"""
SIZES = (("memory", "memory_bytes"), ("port", "port"), ("ctx", "context_tokens"), ("slots", "slots"),
         ("threads", "threads"), ("url", "url"), ("key-file", "key_file"),
         ("upstream-model", "upstream_model"))  # fmt: skip


def inventory_text(fleet: Fleet) -> str:
    """Return one file that says what the whole inventory says to a queen; it needs no other file to be read."""
    return "\n".join([HEADER, *(_host_text(host) for host in fleet.hosts)])


def _host_text(host: Host) -> str:
    # In HostName a `%` begins a token (ssh_config(5)).
    name = _quoted(host.hostname.replace("%", "%%"))
    lines = [f"Host {host.name}", f"    HostName {name}", f"    HivePort {host.hive_port or 'none'}"]
    if host.queen_port:
        lines.append(f"    QueenPort {host.queen_port}")
    if host.region:
        lines.append(f"    Region {_quoted(host.region)}")
    if host.price:
        lines.append(f"    RbeePrice {f'{host.price:.6f}'.rstrip('0').rstrip('.')}")
    if host.tenant:
        lines.append(f"    RbeeTenant {_quoted(host.tenant)}")
    if host.tags:
        lines.append(f"    Tags {' '.join(map(_quoted, host.tags))}")
    lines += [f"    {_worker_text(worker)}" for worker in host.workers]
    return "\n".join(lines) + "\n"


def _worker_text(worker: WorkerLine) -> str:
    values = {"model": worker.model, "backend": worker.backend}
    values |= {key: getattr(worker, name) for key, name in SIZES}
    if worker.gpus:
        values["gpu"] = ",".join(map(str, worker.gpus))
    if worker.capabilities:
        values["capabilities"] = ",".join(worker.capabilities)
    if worker.pin:
        values["pin"] = "yes"
    words = [f"{key}={value}" for key, value in {**values, **worker.options}.items() if value]
    return " ".join(["Worker", worker.name, *map(_quoted, words)])


def _quoted(word: str) -> str:
    return f'"{word}"' if any(character.isspace() or character in "#," for character in word) else word
