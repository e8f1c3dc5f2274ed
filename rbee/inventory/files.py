"""Which files make up an inventory, and the digest by which two are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from rbee.errors import InvalidInventory, Mistake, NotFound
from rbee.inventory.parse import Text


def inventory_files(path: Path) -> tuple[Path, list[Path]]:
    """Return an inventory's folder (absolute) and its files, in the order of their names.

    Raises: NotFound, InvalidInventory when a folder holds none.
    """
    if path.is_file():
        return path.absolute().parent, [path]
    if not path.is_dir():
        raise NotFound(
            f"There is no inventory at {path}", hint="a folder with a .conf file, as docs/inventory.md shows"
        )
    files = sorted(file for file in path.glob("*.conf") if not file.name.startswith("."))
    if not files:
        raise InvalidInventory([Mistake(str(path), 0, "the folder has no .conf file", "docs/inventory.md shows one")])
    return path.absolute(), files


def digest(folder: Path, texts: Iterable[Text]) -> str:
    """Return the SHA-256 of names and bytes; names are relative, so that a copy of the folder has the same one."""
    found = hashlib.sha256()
    for text in texts:
        path = Path(text.path).absolute()
        name = str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
        found.update(f"{len(name)} {name} {len(text.data)}\n".encode())
        found.update(text.data)
    return found.hexdigest()
