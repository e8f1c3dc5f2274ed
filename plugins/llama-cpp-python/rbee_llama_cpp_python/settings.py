"""What an inventory line may say about this engine, read and checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rbee.plugin import ModelSpec

T = TypeVar("T")

OPTIONS: Mapping[str, str] = {
    "n_gpu_layers": "layers that go to the GPU; default: all when the worker has a gpu, else none",
    "main_gpu": "the GPU, counted among those given, that holds what is not split; default 0",
    "tensor_split": "shares of the model for each GPU given, such as 3,1; default: equal ones",
    "n_batch": "most tokens of prompts in one step; default 512",
    "prompt_chunk": "most tokens of prompts in one step while another job is writing; default 128",
    "cache_prompt": "on or off: a job starts from what its slot still knows of the same prompt; default on",
    "penalty_last_n": "how many last tokens the penalties look at; default 64",
    "flash_attn": "auto, on or off; default auto",
    "type_k": "data type of the cached keys: f16, bf16, f32, q8_0 or q4_0; default f16",
    "type_v": "data type of the cached values, as type_k; q8_0 and q4_0 need flash_attn; default f16",
    "use_mmap": "on or off: map the file instead of reading it; default on",
    "use_mlock": "on or off: keep the model out of swap; default off",
    "pooling": "mean, cls or last: give embeddings as well, pooled so; default: as the file says",
}

DEFAULT_CONTEXT_TOKENS = 4096
DEFAULT_SLOTS = 4
MAX_SLOTS = 256
"""LLAMA_MAX_SEQ of llama.cpp: a context with more sequences is refused."""

CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
"""Values of `enum ggml_type` (ggml.h)."""

FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
"""Values of `enum llama_flash_attn_type` (llama.h)."""

POOLING = {"mean": 1, "cls": 2, "last": 3}
"""Values of `enum llama_pooling_type` (llama.h)."""


@dataclass(frozen=True)
class Settings:
    """How to load one model. `context_tokens` is what one job may use; `slots` jobs run at once."""

    path: Path
    slots: int
    context_tokens: int
    threads: int
    gpus: tuple[int, ...]
    gpu_layers: int
    main_gpu: int
    tensor_split: tuple[float, ...]
    batch_tokens: int
    prompt_chunk_tokens: int
    cache_prompt: bool
    penalty_tokens: int
    flash_attention: int
    key_type: int
    value_type: int
    mmap: bool
    mlock: bool
    pooling: int | None


def read_settings(spec: ModelSpec) -> Settings:
    """Check a spec and its options; raise ValueError naming the option that is wrong."""
    if spec.path is None or not spec.path.is_file():
        raise ValueError(f"There is no model file at {spec.path}")
    unknown = sorted(set(spec.options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"Unknown option {', '.join(unknown)}. Known: {', '.join(OPTIONS)}")
    options = _Options(spec.options)
    slots = spec.slots or DEFAULT_SLOTS
    if not 1 <= slots <= MAX_SLOTS:
        raise ValueError(f"slots must be between 1 and {MAX_SLOTS}, not {slots}")
    batch_tokens = max(options.number("n_batch", 512, least=1), 2 * slots)
    return Settings(
        path=spec.path,
        slots=slots,
        context_tokens=spec.context_tokens,
        threads=spec.threads or physical_cores(),
        gpus=spec.gpus,
        gpu_layers=options.number("n_gpu_layers", 999 if spec.gpus else 0, least=0),
        main_gpu=options.number("main_gpu", 0, least=0),
        tensor_split=options.shares("tensor_split", len(spec.gpus)),
        batch_tokens=batch_tokens,
        prompt_chunk_tokens=min(options.number("prompt_chunk", 128, least=1), batch_tokens - slots),
        cache_prompt=options.switch("cache_prompt", default=True),
        penalty_tokens=options.number("penalty_last_n", 64, least=0),
        flash_attention=options.choice("flash_attn", FLASH_ATTENTION, "auto"),
        key_type=options.choice("type_k", CACHE_TYPES, "f16"),
        value_type=options.choice("type_v", CACHE_TYPES, "f16"),
        mmap=options.switch("use_mmap", default=True),
        mlock=options.switch("use_mlock", default=False),
        pooling=options.choice("pooling", POOLING, "") if "pooling" in spec.options else None,
    )


def physical_cores() -> int:
    """Count the cores that this process may use; two threads of one core count once, as llama.cpp does best so."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


@dataclass(frozen=True)
class _Options:
    values: Mapping[str, str]

    def number(self, key: str, default: int, *, least: int) -> int:
        text = self.values.get(key)
        if text is None:
            return default
        if not text.isascii() or not text.isdecimal() or len(text) > 9 or int(text) < least:
            raise ValueError(f"Option {key}: {text!r} is not a whole number of at least {least}")
        return int(text)

    def switch(self, key: str, *, default: bool) -> bool:
        return self.choice(key, {"on": True, "off": False}, "on" if default else "off")

    def choice(self, key: str, choices: Mapping[str, T], default: str) -> T:
        text = self.values.get(key, default)
        if text not in choices:
            raise ValueError(f"Option {key}: {text!r} is none of {', '.join(choices)}")
        return choices[text]

    def shares(self, key: str, gpus: int) -> tuple[float, ...]:
        text = self.values.get(key)
        if text is None:
            return ()
        try:
            shares = tuple(float(part) for part in text.split(","))
        except ValueError:
            shares = ()
        if len(shares) != gpus or not all(0 <= share < float("inf") for share in shares) or not sum(shares) > 0:
            raise ValueError(f"Option {key}: {text!r} is not one share for each of the {gpus} gpus given")
        return shares
