"""Which files a distribution brings to a host, and where they lie on this machine."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from msgspec import Struct

from rbee.apply.release.distributions import editable_folder, project_file, pyproject
from rbee.errors import SetupProblem

SITE = "site"
LEFT_OUT_FOLDERS = {"__pycache__", "tests"}
LEFT_OUT_SUFFIXES = {".pyc", ".pyo", ".pth"}
KEPT_METADATA = {"METADATA", "WHEEL", "entry_points.txt"}


class Item(Struct, frozen=True):
    """One file of a layer: its name under the layer's folder, and either its place here or its bytes."""

    name: str
    path: Path | None = None
    data: bytes = b""
    executable: bool = False

    def read(self) -> bytes:
        """Return the file's bytes."""
        return self.path.read_bytes() if self.path else self.data

    @property
    def fingerprint(self) -> str:
        """A text that changes when the file does, without reading it."""
        if self.path is None:
            return f"{self.name} {self.executable} {hashlib.sha256(self.data).hexdigest()}"
        seen = self.path.stat()
        return f"{self.name} {self.executable} {seen.st_size} {seen.st_mtime_ns} {self.path}"


def installed(known: Distribution) -> list[Item]:
    """Return the files of an installed distribution, without tests, caches and scripts. Raises: SetupProblem."""
    found = {item.name: item for item in _recorded(known)}
    if folder := editable_folder(known):
        found = {name: _up_to_date(item, known) for name, item in found.items()}
        found |= {item.name: item for item in (*_checkout(known), *_beside(folder))}
    items = list(found.values())
    missing = [item.name for item in items if item.path and not item.path.is_file()]
    if missing or not any("dist-info" not in item.name for item in items):
        what = f"lacks {missing[0]}" if missing else "does not say which files are its own"
        raise SetupProblem(
            f"{known.name} {known.version} on this machine {what}, so it cannot be sent to a host",
            hint=f"pip install --force-reinstall {known.name}=={known.version}",
        )
    return _with_record(items)


def in_wheel(wheel: Path) -> list[Item]:
    """Return the files of a wheel (PEP 427), as they lie once it is installed."""
    with zipfile.ZipFile(wheel) as archive:
        items = [
            Item(f"{SITE}/{placed}", data=archive.read(one), executable=bool(one.external_attr >> 16 & 0o100))
            for one in archive.infolist()
            if (placed := _placed(one.filename)) and _wanted(PurePosixPath(placed))
        ]
    return _with_record(items)


def _with_record(items: list[Item]) -> list[Item]:
    """Add a RECORD of what is sent, so that a host which applies an inventory itself can send it on, byte by byte."""
    folder = next(item.name.rpartition("/")[0] for item in items if item.name.endswith(".dist-info/METADATA"))
    names = sorted([*(item.name for item in items), f"{folder}/RECORD"])
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([name.removeprefix(f"{SITE}/"), "", ""] for name in names)
    return [*items, Item(f"{folder}/RECORD", data=text.getvalue().encode())]


def _up_to_date(item: Item, known: Distribution) -> Item:
    """Put a checkout's own requirements into its metadata, which is as old as the last `pip install -e`."""
    project = pyproject(known)
    if project is None or not item.name.endswith(".dist-info/METADATA"):
        return item
    head, blank, body = item.read().decode().partition("\n\n")
    kept = [line for line in head.splitlines() if not line.startswith(("Requires-Dist:", "Provides-Extra:"))]
    added = [f"Provides-Extra: {extra}" for extra in project if extra]
    added += [f"Requires-Dist: {text}" for texts in project.values() for text in texts]
    return Item(item.name, data=("\n".join(kept + added) + blank + body).encode())


def _placed(name: str) -> str:
    if name.endswith("/"):
        return ""
    top, _, rest = name.partition("/")
    if not top.endswith(".data"):
        return name
    scheme, _, rest = rest.partition("/")
    return rest if scheme in {"purelib", "platlib"} else ""


def _recorded(known: Distribution) -> list[Item]:
    files = [file for file in known.files or [] if _wanted(file)]
    return [_item(file.as_posix(), Path(str(known.locate_file(file)))) for file in sorted(files)]


def _item(placed: str, path: Path) -> Item:
    return Item(f"{SITE}/{placed}", path, executable=os.access(path, os.X_OK))


def _wanted(file: PurePosixPath) -> bool:
    if file.is_absolute() or ".." in file.parts or LEFT_OUT_FOLDERS & set(file.parts[:-1]):
        return False
    if file.parts[0].endswith(".dist-info"):
        return file.name in KEPT_METADATA or "licenses" in file.parts
    return file.suffix not in LEFT_OUT_SUFFIXES


def _checkout(known: Distribution) -> list[Item]:
    return [item for package in _packages(known) for item in _walk(package, PurePosixPath(package.name))]


def _packages(known: Distribution) -> Iterator[Path]:
    """Yield the folders of an editable install's packages: those its entry points or its own name lead to."""
    names = {entry.module.partition(".")[0] for entry in known.entry_points}
    names |= {known.name.replace("-", "_"), *(known.read_text("top_level.txt") or "").split()}
    for name in sorted(names):
        spec = find_spec(name)
        if spec is not None:
            yield from map(Path, spec.submodule_search_locations or ())


def _beside(folder: Path) -> Iterator[Item]:
    """Yield what hatch puts into the package from elsewhere in a checkout: an install holds copies as old as itself."""
    settings: object = project_file(folder)
    for name in ("tool", "hatch", "build", "targets", "wheel", "force-include"):
        settings = settings.get(name, {}) if isinstance(settings, dict) else {}
    for source, target in settings.items() if isinstance(settings, dict) else ():
        yield from _walk(folder / source, PurePosixPath(target))


def _walk(folder: Path, placed: PurePosixPath) -> Iterator[Item]:
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        name = placed / inside
        if path.is_file() and not any(part.startswith(".") for part in inside.parts) and _wanted(name):
            yield _item(name.as_posix(), path)
