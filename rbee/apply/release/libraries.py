"""Shared libraries that a minimal host lacks: xllamacpp needs libgomp.so.1, which comes with a compiler on Debian."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path

from rbee.apply.release.contents import Item
from rbee.apply.release.elf import needs

ON_EVERY_HOST = re.compile(r"(lib(c|m|dl|rt|pthread|util|resolv|anl|crypt|gcc_s|stdc\+\+|z)|ld-linux-[\w-]+)\.so\.\d+")
"""glibc's own, and what the wheels of manylinux (PEP 600) may expect of any machine that runs Python."""
OF_A_DRIVER = re.compile(
    r"lib(cuda|cudart|cublas|cufft|curand|cusolver|cusparse|nv|nccl|hip|roc|hsa|OpenCL|vulkan|ze_)"
)
"""These belong to the host's own GPU driver; a copy from elsewhere would not fit it."""


def shipped(asked: Iterable[str], present: Iterable[str]) -> dict[str, list[Item]]:
    """Return, by name, the libraries to send: what is asked for, not on every host and not `present` in a package.

    One that this machine lacks as well is left out: an engine may name a library that it loads only on a GPU.
    """
    present = set(present)
    found: dict[str, list[Item]] = {}
    waiting = sorted(set(asked))
    while waiting:
        name = waiting.pop(0)
        if name in present or name in found or ON_EVERY_HOST.fullmatch(name) or OF_A_DRIVER.match(name):
            continue
        if path := here(name):
            found[name] = [Item(f"lib/{name}", path)]
            waiting += needs(path.read_bytes()).libraries
    return found


def here(name: str) -> Path | None:
    """Return where this machine's loader finds a library, or None when it has none of this name."""
    try:
        ctypes.CDLL(name)
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    # The loader follows links, so the mapped file may be libgomp.so.1.0.0 for libgomp.so.1.
    mapped = (line.split(maxsplit=5)[5] for line in lines if line.count("/"))
    return next((Path(path) for path in mapped if Path(path).name.startswith(name)), None)
