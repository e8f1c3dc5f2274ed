"""From a model's spec to llama.cpp's parameters: pure, so that a test reads it as a table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rbee.plugin import Capability, Endpoint, Feature, ModelSpec

OPTIONS: Mapping[str, str] = {
    "batch": "tokens of a prompt that are read in one step (default 512)",
    "chat_template": "a file with a Jinja chat template instead of the model's own",
    "draft": "a small GGUF file whose guesses speed the model up (speculative decoding)",
    "draft_max": "tokens guessed at once (default 3)",
    "flash_attention": "auto (default), on or off",
    "gpu_layers": "layers on the GPU (default: all, when the device is a GPU)",
    "kv": "separate (default): every slot owns a full context; shared: all slots share one, which saves memory, "
    "but jobs that outgrow it together all fail",
    "kv_type": "f16 (default), bf16, q8_0, q5_1, q5_0, q4_1 or q4_0: the number format of the context's memory",
    "lora": "a LoRA adapter in GGUF; FILE or FILE:SCALE, several with commas",
    "mmproj": "the vision projector in GGUF, for images",
    "pooling": "mean, cls or last, for embedding models that do not say",
    "prompt_cache_mb": "memory for prompts that may come again (default 256; 0: only what the slots hold)",
    "verbose": "llama.cpp's own log: 1 errors (default), 2 warnings, 3 information, 4 everything",
    "warmup": "on: run the model once before the worker is ready (default off)",
}
DEFAULT_SLOTS = 4
SMALL_MODEL_BYTES = 32 * 1024 * 1024
KV_TYPES = ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


@dataclass(frozen=True)
class Settings:
    """What the engine is told (`params`: dotted names of xllamacpp.CommonParams), and what follows from it."""

    params: Mapping[str, object]
    slots: int
    context_tokens: int
    capabilities: frozenset[Capability]
    features: frozenset[Feature]


def settings(spec: ModelSpec, listen: Endpoint) -> Settings:
    """Decide the engine's parameters. Raises: ValueError that names the option."""
    slots = spec.slots or DEFAULT_SLOTS
    options = dict(spec.options)
    shared = _choice(options, "kv", ("separate", "shared")) == "shared"
    threads = _threads(spec)
    kv_type = f"GGML_TYPE_{_choice(options, 'kv_type', KV_TYPES).upper()}"
    batch = _number(options, "batch", 512, 1, 65536)
    params: dict[str, object] = {
        **_listening(listen),
        "model.path": str(spec.path),
        "model_alias": [spec.name],
        "n_parallel": slots,
        "n_ctx": spec.context_tokens * (1 if shared else slots),
        "kv_unified": shared,
        "n_batch": max(batch, 2048) if batch <= 2048 else batch,
        "n_ubatch": batch,
        "cpuparams.n_threads": threads,
        "cpuparams_batch.n_threads": threads,
        "n_gpu_layers": _number(options, "gpu_layers", 0 if spec.device == "cpu" else 999, 0, 999),
        "cache_type_k": kv_type,
        "cache_type_v": kv_type,
        "flash_attn_type": f"LLAMA_FLASH_ATTN_TYPE_{_flash(options)}",
        "cache_ram_mib": _number(options, "prompt_cache_mb", 256, 0, 1 << 20),
        "warmup": _choice(options, "warmup", ("off", "on")) == "on",
        "verbosity": _number(options, "verbose", 1, 0, 9),
        # Shrinking the context in silence to fit the memory would break what the worker promised.
        "fit_params": False,
        "use_jinja": True,
        "endpoint_metrics": True,
        "endpoint_slots": True,
        "ui": False,
        "offline": True,
        "cors_origins": "",
    }
    params |= _files(options)
    capabilities = _capabilities(spec.capabilities)
    params |= _mode(capabilities, options, spec.context_tokens)
    return Settings(params, slots, spec.context_tokens, capabilities, _features(capabilities, options))


def _listening(listen: Endpoint) -> dict[str, object]:
    if listen.url.startswith("unix:"):
        # llama.cpp takes a host name that ends in .sock for a socket's path; the port must be set all the same.
        return {"hostnames": [listen.url.removeprefix("unix:")], "port": 8080, "api_keys": [listen.token]}
    parts = urlsplit(listen.url)
    return {"hostnames": [parts.hostname], "port": parts.port, "api_keys": [listen.token]}


def _capabilities(of_file: frozenset[Capability]) -> frozenset[Capability]:
    """Choose the mode: llama.cpp's server either generates, embeds or ranks."""
    for one in (Capability.RERANK, Capability.EMBEDDING):
        if one in of_file and Capability.CHAT not in of_file:
            return frozenset({one})
    return of_file & {Capability.CHAT, Capability.COMPLETION} or frozenset({Capability.CHAT, Capability.COMPLETION})


def _features(capabilities: frozenset[Capability], options: Mapping[str, str]) -> frozenset[Feature]:
    if Capability.COMPLETION not in capabilities:
        return frozenset()
    found = {Feature.JSON_SCHEMA, Feature.LOGPROBS}
    if Capability.CHAT in capabilities:
        found |= {Feature.RESPONSES, Feature.MESSAGES, Feature.TOOLS}
        found |= {Feature.VISION} if "mmproj" in options else set()
    return frozenset(found)


def _mode(capabilities: frozenset[Capability], options: Mapping[str, str], context: int) -> dict[str, object]:
    if Capability.COMPLETION in capabilities:
        return {}
    # An embedding sees its whole text at once, so one physical batch must hold it.
    mode: dict[str, object] = {"embedding": True}
    if context:
        mode |= {"n_batch": context, "n_ubatch": context}
    if Capability.RERANK in capabilities:
        mode["pooling_type"] = "LLAMA_POOLING_TYPE_RANK"
    elif "pooling" in options:
        mode["pooling_type"] = f"LLAMA_POOLING_TYPE_{_choice(options, 'pooling', ('mean', 'cls', 'last')).upper()}"
    return mode


def _files(options: Mapping[str, str]) -> dict[str, object]:
    found: dict[str, object] = {}
    if "mmproj" in options:
        found["mmproj.path"] = _file(options, "mmproj")
    if "draft" in options:
        found["speculative.draft.mparams.path"] = _file(options, "draft")
        found["speculative.types"] = ["COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE"]
        found["speculative.draft.n_max"] = _number(options, "draft_max", 3, 1, 64)
    if "chat_template" in options:
        found["chat_template"] = Path(_file(options, "chat_template")).read_text()
    if "lora" in options:
        found["lora_adapters"] = [_adapter(entry) for entry in options["lora"].split(",")]
    return found


def _adapter(entry: str) -> tuple[str, float]:
    path, colon, scale = entry.rpartition(":")
    if not colon:
        path, scale = entry, "1"
    try:
        return _file({"lora": path}, "lora"), float(scale)
    except ValueError:
        raise ValueError(f"the option lora takes FILE or FILE:SCALE, not {entry!r}") from None


def _file(options: Mapping[str, str], key: str) -> str:
    path = Path(options[key]).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"the option {key} names {options[key]}, which is no file")
    return str(path.absolute())


def _choice(options: Mapping[str, str], key: str, allowed: tuple[str, ...]) -> str:
    value = options.get(key, allowed[0])
    if value not in allowed:
        raise ValueError(f"the option {key} is one of {', '.join(allowed)}, not {value!r}")
    return value


def _flash(options: Mapping[str, str]) -> str:
    chosen = _choice(options, "flash_attention", ("auto", "on", "off"))
    return {"auto": "AUTO", "on": "ENABLED", "off": "DISABLED"}[chosen]


def _number(options: Mapping[str, str], key: str, default: int, low: int, high: int) -> int:
    value = options.get(key, str(default))
    if not value.isascii() or not value.isdigit() or not low <= int(value) <= high:
        raise ValueError(f"the option {key} is a whole number from {low} to {high}, not {value!r}")
    return int(value)


def _threads(spec: ModelSpec) -> int:
    """Return how many threads compute: the physical cores that this process may use, or what was asked for."""
    wanted = spec.threads
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    if wanted:
        return min(wanted, 2 * len(usable))
    if spec.path and spec.path.stat().st_size < SMALL_MODEL_BYTES:
        return 1  # its threads would wait for each other longer than they compute
    siblings = {_core(cpu) for cpu in usable}
    return max(1, len(siblings))


def _core(cpu: int) -> str:
    """Name the physical core of a logical CPU; hyper-threads of one core gain nothing when both compute."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)
