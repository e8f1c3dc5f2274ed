"""Make a plugin distribution in a folder, as pip would leave it, for tests of good and bad ones."""

from __future__ import annotations

from pathlib import Path

BACKEND = """
import time
from rbee.plugin import AnsweringBackend, Capability, Loaded
class Plugin(AnsweringBackend):
    name, summary, capabilities = {name!r}, "made by a test", frozenset({{Capability.CHAT}})
    {body}
"""


def install(folder: Path, name: str, source: str) -> dict[str, str]:
    """Write module `rbee_<name>` with an entry point `name`; return the environment that finds it."""
    module = f"rbee_{name.replace('-', '_')}"
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rbee-{name}\nVersion: 1.2.3\n")
    (info / "entry_points.txt").write_text(f"[rbee.backends]\n{name} = {module}:Plugin\n")
    return {"PYTHONPATH": str(folder)}
