"""Whether an engine that was compiled on this machine runs on another CPU: `-march=native` ends in SIGILL elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution

from rbee.apply.release.target import Target
from rbee.apply.release.wheels import built_for
from rbee.errors import SetupProblem

# ggml's own name of an instruction set (ggml-cpu.h: `ggml_cpu_has_…`), and the kernel's in /proc/cpuinfo.
FLAGS = {
    "sse3": "pni", "ssse3": "ssse3", "avx": "avx", "avx_vnni": "avx_vnni", "avx2": "avx2", "bmi2": "bmi2",
    "f16c": "f16c", "fma": "fma", "avx512": "avx512f", "avx512_vbmi": "avx512vbmi", "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16", "amx_int8": "amx_int8", "neon": "asimd", "arm_fma": "asimd", "fp16_va": "asimdhp",
    "dotprod": "asimddp", "matmul_int8": "i8mm", "sve": "sve", "sme": "sme",
}  # fmt: skip
# What ggml answers is fixed when it is compiled. It runs in a process of its own: loading an engine is not undone.
ASK = """
import ctypes, json, sys
library, names = sys.argv[1], json.loads(sys.argv[2])
engine = ctypes.CDLL(library)
print(json.dumps([name for name in names if getattr(engine, f"ggml_cpu_has_{name}", int)()]))
"""
LIMIT_S = 30


def check_cpu(wanted: Iterable[Distribution], target: Target) -> None:
    """Raise: SetupProblem for an engine compiled here with instructions that the host's CPU lacks."""
    if not target.cpu_flags or not target.is_this_machines_kind():
        return
    for known in wanted:
        lacking = sorted(compiled_for(known) - target.cpu_flags)
        if lacking:
            raise SetupProblem(
                f"{known.name} was compiled on this machine for its own CPU; the host's CPU lacks {', '.join(lacking)}",
                hint=f"CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --force-reinstall --no-binary :all: --no-deps "
                f"'{known.name}=={known.version}'",
            )


def compiled_for(known: Distribution) -> set[str]:
    """Return the CPU flags that a locally compiled engine of ggml needs; a wheel from an index is built for any CPU."""
    if not any(tag.platform.startswith("linux_") for tag in built_for(known)):
        return set()
    libraries = [file for file in known.files or [] if file.name.startswith("libggml-cpu") and ".so" in file.name]
    if not libraries:
        return set()
    command = [sys.executable, "-c", ASK, str(known.locate_file(libraries[0])), json.dumps(list(FLAGS))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    except (subprocess.SubprocessError, OSError):
        return set()
    return {FLAGS[name] for name in json.loads(done.stdout)}
