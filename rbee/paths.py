"""Where rbee keeps its files: the XDG folders, or everything under RBEE_HOME."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

BUILT_IN_MODEL = "rbee-demo"
"""The model that comes with rbee."""
BUILT_IN_FILE = Path(__file__).parent / "models" / f"{BUILT_IN_MODEL}.gguf"


def _folder(variable: str, default: str, part: str) -> Path:
    home = os.environ.get("RBEE_HOME")
    if home:
        return Path(home).expanduser().absolute() / part
    base = os.environ.get(variable)
    return (Path(base) if base and os.path.isabs(base) else Path.home() / default) / "rbee"


def config_dir() -> Path:
    """Return the folder of what a person writes: hives.conf, scheduler.rhai."""
    return _folder("XDG_CONFIG_HOME", ".config", "config")


def state_dir() -> Path:
    """Return the folder of what rbee remembers: keys, the catalog, logs."""
    return _folder("XDG_STATE_HOME", ".local/state", "state")


def cache_dir() -> Path:
    """Return the folder of what may be deleted at any time."""
    return _folder("XDG_CACHE_HOME", ".cache", "cache")


def runtime_dir() -> Path:
    """Return the folder of sockets and one-time files, mode 0700; it is made when missing."""
    folder = state_dir() / "run"
    base = os.environ.get("XDG_RUNTIME_DIR")
    if not os.environ.get("RBEE_HOME") and base and os.access(base, os.W_OK):
        folder = Path(base) / "rbee"
    return private(folder)


def private(folder: Path) -> Path:
    """Make a folder that only its owner may enter, and return it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def write_private(path: Path, data: bytes) -> None:
    """Write a file of mode 0600 so that a reader sees the old bytes or the new ones, also after a crash."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
