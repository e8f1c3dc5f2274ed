"""The programs in a release's `bin`, and the check that a fresh release must pass on its host."""

from __future__ import annotations

import shlex

# Links are resolved first: a running program, and what it starts, never sees a later release.
# -S keeps the host's own packages out, -P the current folder; -X shows in `ps` which release a process runs.
PYTHON = """\
#!/bin/sh
real=$(readlink -f -- "$0") || exit 127
release=${{real%/bin/*}}
export PYTHONPATH="$release/site" PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1
if [ -d "$release/lib" ]; then
    export LD_LIBRARY_PATH="$release/lib${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
fi
exec {interpreter} -X "rbee=$release" -S -P "$@"
"""
RBEE = """\
#!/bin/sh
real=$(readlink -f -- "$0") || exit 127
exec "${real%/rbee}/rbee-python" -c 'import sys; from rbee.cli.main import main; sys.exit(main())' "$@"
"""
# The queen's first: she patches the standard library, which must come before anything else is imported.
MODULES = {
    "queen": ("rbee.queen.__main__",),
    "hive": ("rbee.hive.agent",),
    "apply": ("cryptography.x509", "pyinfra"),
    "jwt": ("cryptography.hazmat.primitives.asymmetric.ed25519", "jwt"),
    "otel": ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk.trace"),
    "redis": ("redis",),
}


def files(interpreter: str) -> dict[str, str]:
    """Return the texts of the programs, by their path in a release."""
    return {"bin/rbee-python": PYTHON.format(interpreter=shlex.quote(interpreter)), "bin/rbee": RBEE}


def check(roles: frozenset[str], backends: frozenset[str]) -> str:
    """Return a Python program that fails where a role's modules or a backend's engine cannot be loaded."""
    modules = [module for role, names in MODULES.items() if role in roles for module in names]
    lines = [f"import {module}" for module in (*modules, "rbee.cli.main")]
    if backends:
        lines += ["from rbee.worker.backends import find", f"for name in {sorted(backends)!r}: find(name)"]
    return "\n".join(lines)
