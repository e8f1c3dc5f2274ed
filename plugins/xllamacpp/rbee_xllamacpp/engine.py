"""The engine's own process: llama.cpp's server, told what to do by one line of JSON on stdin.

A process of its own, because the wheel holds Python's lock while it loads a model, which would silence the worker's
`/health` and its signals, and because llama.cpp ends its process when an assertion fails (GGML_ABORT). The worker
then still tells its clients what happened. This module imports next to nothing: what it costs, every worker costs.
"""

import json
import os
import signal
import sys
from typing import Any

ENUMS = {
    "cache_type_k": "ggml_type",
    "cache_type_v": "ggml_type",
    "pooling_type": "llama_pooling_type",
    "flash_attn_type": "llama_flash_attn_type",
}


def main() -> None:
    """Load, report one line of JSON on stdout, serve until stdin closes."""
    told = json.loads(sys.stdin.readline())
    _end_with(told["parent_pid"])
    # The reports go to a descriptor of their own: llama.cpp must not write into them.
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        server, report = _load(told)
    except Exception as problem:  # noqa: BLE001  whatever it is, the person must read it
        report = {"problem": f"{problem}" or type(problem).__name__}
        server = None
    print(json.dumps(report), file=reports, flush=True)
    if server is not None:
        sys.stdin.read()
    # Not by way of the server's destructor: it waits for the jobs that run, and nothing here needs saving.
    os._exit(0 if server is not None else 1)


def _load(told: dict[str, Any]) -> tuple[object, dict[str, object]]:
    import xllamacpp  # type: ignore[import-untyped]

    gpus = [device for device in xllamacpp.get_device_info() if "GPU" in device["type"].name]
    if told["device"] != "cpu" and not gpus:
        raise RuntimeError(f"this build of xllamacpp has no {told['device']} support, or the machine no such device")
    params = xllamacpp.CommonParams()
    for path, value in told["params"].items():
        *parents, name = path.split(".")
        target: Any = params
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, _typed(xllamacpp, name, value))
    server = xllamacpp.Server(params)
    return server, {"listening": server.listening_address}


def _typed(xllamacpp: Any, name: str, value: Any) -> object:
    """Turn JSON's types into those of the parameter."""
    if name in ENUMS:
        return getattr(xllamacpp, ENUMS[name])[value]
    if name == "model_alias":
        return set(value)
    if name == "types":
        return [xllamacpp.common_speculative_type[one] for one in value]
    if name == "lora_adapters":
        return [xllamacpp.CommonAdapterLoraInfo(path, scale) for path, scale in value]
    return value


def _end_with(parent_pid: int) -> None:
    from rbee.lifeline import die_with_parent

    die_with_parent(parent_pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
