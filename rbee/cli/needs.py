"""What a command needs besides plain rbee."""

from __future__ import annotations

import importlib.util

from rbee.errors import SetupProblem


def need(module: str, extra: str) -> None:
    """Raise SetupProblem, naming the extra that has it, when a package is not installed."""
    if importlib.util.find_spec(module) is None:
        raise SetupProblem(f"The package {module} is not installed here", hint=f"pip install 'rbee[{extra}]'")
