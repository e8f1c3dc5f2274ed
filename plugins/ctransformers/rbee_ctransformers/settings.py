"""What an inventory line may say about this engine, and of which family a model is."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rbee.plugin import ModelSpec

FAMILIES = ("gpt2", "gptj", "gpt_neox", "dolly-v2", "mpt", "starcoder", "replit", "falcon", "llama")
"""Model families of ctransformers 0.2.27 that do not use GGUF."""

_ALIASES = {"gptbigcode": "starcoder", "refinedweb": "falcon", "refinedwebmodel": "falcon"}
"""How config.json names some of the families."""

LIBRARIES = ("avx2", "avx", "basic")

OPTIONS: Mapping[str, str] = {
    "model_type": f"the model's family: {', '.join(FAMILIES)}; default: as a config.json beside the file says",
    "lib": "the build of the engine: avx2, avx or basic; default: the best for this processor",
    "batch_size": "tokens of a prompt computed at once; more need more memory; default 8",
}

_GGUF_MAGIC = b"GGUF"
_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"ccgg")
"""ggml, ggmf, ggjt and ggcc, as little-endian numbers."""

_COUNTED = {"gpt2": 6, "starcoder": 6, "gptj": 7}
"""Families that repeat the size of the vocabulary, which comes first, after so many numbers."""
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Settings:
    """How to load one model; `context_tokens` -1 leaves the choice to the engine."""

    path: Path
    family: str
    library: str | None
    batch_tokens: int
    context_tokens: int
    threads: int


def read_settings(spec: ModelSpec) -> Settings:
    """Check a spec and its options; raise ValueError naming the option that is wrong."""
    if spec.path is None or not spec.path.is_file():
        raise ValueError(f"There is no model file at {spec.path}")
    unknown = sorted(set(spec.options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"Unknown option {', '.join(unknown)}. Known: {', '.join(OPTIONS)}")
    if spec.gpus:
        raise ValueError("This engine runs on the CPU only here. Try: the engine xllamacpp with a GGUF of the model")
    library = spec.options.get("lib")
    if library is not None and library not in LIBRARIES:
        raise ValueError(f"Option lib: {library!r} is none of {', '.join(LIBRARIES)}")
    batch = spec.options.get("batch_size", "8")
    if not (batch.isascii() and batch.isdecimal() and 1 <= int(batch[:6]) <= 4096 and len(batch) <= 4):
        raise ValueError(f"Option batch_size: {batch!r} is not a whole number from 1 to 4096")
    family = _family(spec.path, spec.options.get("model_type"))
    _check_header(spec.path, family)
    return Settings(
        path=spec.path,
        family=family,
        library=library,
        batch_tokens=int(batch),
        context_tokens=spec.context_tokens or -1,
        threads=spec.threads or default_threads(),
    )


def default_threads() -> int:
    """Return all cores of this process but one.

    The engine's threads spin while they wait for each other: where another program takes a core from one of them,
    all stand still, and a token takes a hundred times as long.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable - 1)


def best_library(cpu_info: str) -> str | None:
    """Choose a build by the text of /proc/cpuinfo; None leaves it to ctransformers, which takes a second for it."""
    flags = next((line.split(":", 1)[1].split() for line in cpu_info.splitlines() if line.startswith("flags")), [])
    if "avx2" in flags:
        return "avx2"
    if "avx" in flags and "f16c" in flags:
        return "avx"
    return None


def _check_header(path: Path, family: str) -> None:
    """Refuse a file that cannot be of this family: the engine would end the process instead of saying so."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[:4] == _GGUF_MAGIC:
        raise ValueError(f"{path} is a GGUF file. Try: the engine xllamacpp or llama-cpp-python")
    if head[:4] not in _MAGICS or len(head) < 64:
        raise ValueError(f"{path} is no model file of a GGML format")
    count = _COUNTED.get(family)
    if count is not None:
        numbers = struct.unpack_from(f"<{count + 1}I", head, 4)
        if numbers[0] != numbers[count]:
            raise ValueError(f"{path} is no model of the family {family}. Try: another model_type")


def _family(path: Path, option: str | None) -> str:
    """Name the family: the file does not say, and loading it as another one reads nonsense, or ends the process."""
    if option is not None:
        family = _known(option)
        if family is None:
            raise ValueError(f"Option model_type: {option!r} is none of {', '.join(FAMILIES)}")
        return family
    config = path.with_name("config.json")
    stated = _stated(config)
    family = _known(stated) if stated else None
    if family is None:
        found = f"{config} says {stated!r}" if stated else f"there is no {config} that says"
        raise ValueError(
            f"Which family is {path.name} of? The file does not tell, and {found}. "
            f"Try: the option model_type, one of {', '.join(FAMILIES)}"
        )
    return family


def _stated(config: Path) -> str | None:
    try:
        with config.open("rb") as file:
            value = json.loads(file.read(_MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    stated = value.get("model_type") if isinstance(value, dict) else None
    return stated if isinstance(stated, str) else None


def _known(name: str) -> str | None:
    plain = "".join(character for character in name.lower() if character.isalnum())
    by_plain_name = {"".join(c for c in family if c.isalnum()): family for family in FAMILIES}
    return _ALIASES.get(plain) or by_plain_name.get(plain)
