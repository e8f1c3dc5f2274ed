"""What `rbee apply` sends to a host, so that a machine with only sshd and Python runs exactly this machine's versions.

`build` is the whole path: which distributions, which files, packed into layers, laid over each other by a manifest.
The other side is `rbee.apply.unpack`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

import rbee
from rbee import paths
from rbee.apply.release import libraries, memory, overlay, programs, wheels
from rbee.apply.release.contents import Item
from rbee.apply.release.cpu import check_cpu
from rbee.apply.release.distributions import closure, roots
from rbee.apply.release.layers import MAGIC, Cache, Layer
from rbee.apply.release.target import Target
from rbee.errors import SetupProblem

__all__ = ["Layer", "Release", "Target", "build", "stream"]

MODELS = "site/rbee/models/"
FORMAT = 1


class Release(Struct, frozen=True, kw_only=True):
    """What one host runs. Equal input gives an equal `id`; hosts of one kind share it."""

    id: str
    layers: tuple[Layer, ...]
    manifest: dict[str, Any]

    @property
    def packed_bytes(self) -> int:
        """What a host is sent that has none of its layers."""
        return sum(layer.packed_bytes for layer in self.layers)

    @property
    def bytes(self) -> int:
        """What it takes on the host's disk, without what other releases share."""
        return sum(layer.bytes for layer in self.layers)


def build(
    roles: frozenset[str], backends: frozenset[str], target: Target, *, folder: Path | None = None, online: bool = True
) -> Release:
    """Return the release for a host, packing what the cache lacks.

    `roles` are of "hive", "queen", "apply", and of a queen's extras: "jwt", "otel", "redis". `backends` are names of
    worker backends. `folder` is the cache, and `online` False forbids a download. Raises: SetupProblem or PluginProblem
    with what to install, or where.
    """
    target.check()
    place = folder or paths.cache_dir() / "releases"
    key = memory.key_of(FORMAT, sorted(roles), sorted(backends), msgspec.json.encode(target, order="deterministic"))
    known = memory.recall(place, key)
    if known is None:
        known = _build(roles, backends, target, place, online=online)
        memory.remember(place, key, known)
    return known


def _build(roles: frozenset[str], backends: frozenset[str], target: Target, place: Path, *, online: bool) -> Release:
    cache = Cache(place)
    wanted = closure(roots(roles, backends), target.markers())
    check_cpu(wanted, target)
    layers = [layer for known in wanted for layer in _layers(cache, known, target, online)]
    if not roles & {"hive", "apply"}:
        layers = [layer for layer in layers if layer.name != "rbee-demo-model"]
    layers += _libraries(cache, layers, target)
    _check_compiled(layers, target)
    cache.prune()
    return _release(tuple(layers), roles, backends, target)


def stream(release: Release, lacking: Iterable[str]) -> Iterator[bytes]:
    """Yield what `unpack.receive` reads on a host that lacks these layers (SHA-256 of each): a line, then archives."""
    wanted = set(lacking)
    sent = [layer for layer in release.layers if layer.sha256 in wanted]
    order = {"manifest": release.manifest, "sent": [layer.sha256 for layer in sent]}
    yield json.dumps(order, sort_keys=True).encode() + b"\n"
    for layer in sent:
        with layer.path.open("rb") as file:
            while data := file.read(1 << 18):
                yield data


def _layers(cache: Cache, known: Distribution, target: Target, online: bool) -> Iterator[Layer]:
    """Yield one layer a distribution; the built-in model is its own, since it seldom changes."""
    items = wheels.contents(known, target, cache.folder, online=online)
    models = [item for item in items if item.name.startswith(MODELS)]
    code = [item for item in items if not item.name.startswith(MODELS)]
    yield cache.layer(known.name, code)
    if models:
        yield cache.layer("rbee-demo-model", models)


def _libraries(cache: Cache, layers: Iterable[Layer], target: Target) -> list[Layer]:
    asked = {library for layer in layers for library in layer.libraries}
    present = {file.rpartition("/")[2] for layer in layers for file in layer.files}
    found: dict[str, list[Item]] = {}
    if target.is_this_machines_kind():
        found = libraries.shipped(asked, present)
    return [cache.layer(name, items) for name, items in sorted(found.items())]


def _check_compiled(layers: Iterable[Layer], target: Target) -> None:
    for layer in layers:
        if layer.machines and target.machine not in layer.machines:
            raise SetupProblem(
                f"{layer.name} has compiled files for {', '.join(layer.machines)}, but the host is {target.machine}",
                hint="a backend that has a build for such a machine: rbee plugin list",
            )
        if target.glibc and layer.glibc > target.glibc:
            needed, there = (".".join(map(str, version)) for version in (layer.glibc, target.glibc))
            raise SetupProblem(
                f"{layer.name} as installed on this machine needs glibc {needed}, but the host has {there}",
                hint=f"put a wheel of it built for glibc {there} into {paths.cache_dir() / 'releases/wheels'}",
            )


def _release(layers: tuple[Layer, ...], roles: frozenset[str], backends: frozenset[str], target: Target) -> Release:
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "rbee": rbee.__version__,
        "python": target.python,
        "interpreter": target.interpreter,
        "machine": target.machine,
        "pyc": MAGIC,
        "roles": sorted(roles),
        "backends": sorted(backends),
        "layers": [
            {"name": one.name, "sha256": one.sha256, "packed_bytes": one.packed_bytes, "bytes": one.bytes}
            for one in layers
        ],
        "files": programs.files(target.interpreter),
        "links": overlay.links({one.sha256: one.files for one in layers}),
        "check": programs.check(roles, backends),
    }
    # How an archive is packed may differ between two machines; what it holds may not.
    identity = {**manifest, "layers": [one.sha256 for one in layers]}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return Release(id=name, layers=layers, manifest={**manifest, "id": name})
