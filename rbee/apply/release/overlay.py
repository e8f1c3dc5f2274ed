"""A release is the overlay of its layers: a tree of links, so that one path entry serves every package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath


def links(layers: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return which link of a release leads where: path to target, both relative.

    `layers` are the files of each, by SHA-256. A folder that one layer owns alone becomes one link; one that several
    share (a namespace package, `lib`) becomes a folder of links. Of two equal names the first layer's wins.
    """
    found: dict[str, str] = {}
    _merge(PurePosixPath(), {sha256: list(files) for sha256, files in layers.items()}, found)
    return found


def _merge(folder: PurePosixPath, layers: Mapping[str, Sequence[str]], found: dict[str, str]) -> None:
    """Link everything under one folder; `layers` holds the names below it."""
    below: dict[str, dict[str, list[str]]] = {}
    for sha256, files in layers.items():
        for file in files:
            first, _, rest = file.partition("/")
            below.setdefault(first, {}).setdefault(sha256, []).append(rest)
    for name, owners in sorted(below.items()):
        place = folder / name
        first, files = next(iter(owners.items()))
        if len(owners) == 1 or "" in files:
            found[str(place)] = "../" * (len(place.parts) + 1) + f"layers/{first}/{place}"
        else:
            _merge(place, {sha256: [file for file in files if file] for sha256, files in owners.items()}, found)
