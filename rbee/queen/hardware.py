"""What a worker runs on, in the words that routing scripts use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from rbee.wire.fleet import Device

MAKERS = re.compile(r"\b(nvidia|geforce|amd|radeon|instinct|intel|arc|apple|tesla|quadro)\b|\((r|tm)\)", re.IGNORECASE)
FORM = re.compile(
    r"[- ](sxm\d?|pcie|hbm\d\w?|nvl|mig|\d+ ?gb)\b.*| (laptop|generation|graphics|gpu)\b.*", re.IGNORECASE
)


class Hardware(NamedTuple):
    """The devices of a worker; memory is in bytes, and zero where it is not known."""

    gpu_type: str = ""
    gpus: int = 0
    vram_total: int = 0
    vram_free: int = 0


def hardware(kind: str, devices: Sequence[Device], lines: Sequence[str] = (), chosen: Sequence[int] = ()) -> Hardware:
    """Return what a worker on devices of this kind has.

    `devices` is what its hive reports, `lines` the inventory's `Gpu` lines (`0 cuda 24G [TYPE]`), which count where
    nothing is reported; `chosen` are the numbers of the GPUs that it may use, empty for all of them.
    """
    if kind == "cpu":
        return Hardware()
    found = [device for device in devices if device.kind == kind and (not chosen or device.index in chosen)]
    words = [line.split() for line in lines]
    declared = [line for line in words if len(line) > 1 and line[1] == kind and (not chosen or int(line[0]) in chosen)]
    named = next((line[3] for line in declared if len(line) > 3), "")
    return Hardware(
        gpu_type=named or next((gpu_type(device.name) for device in found if device.name), ""),
        gpus=len(found) or len(declared) or len(chosen) or 1,
        vram_total=sum(device.memory_total_bytes for device in found) or sum(map(_memory, declared)),
        vram_free=sum(device.memory_free_bytes for device in found),
    )


@lru_cache(maxsize=256)
def gpu_type(name: str) -> str:
    """Return a device's name as scripts write it: RTX4090 for `NVIDIA GeForce RTX 4090`."""
    return re.sub(r"[^A-Za-z0-9]", "", FORM.sub("", MAKERS.sub("", name).strip()))


def _memory(line: Sequence[str]) -> int:
    found = re.fullmatch(r"(\d+)([KMGT])i?B?", line[2], re.IGNORECASE) if len(line) > 2 else None
    return int(found[1]) << 10 * (1 + "KMGT".index(found[2].upper())) if found else 0
