"""Where a distribution's files come from: this machine's own install, or a wheel of the same version for the host."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import Distribution
from importlib.util import find_spec
from pathlib import Path

from packaging.tags import Tag, parse_tag
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from rbee.apply.release.contents import Item, in_wheel, installed
from rbee.apply.release.distributions import editable_folder
from rbee.apply.release.target import Target
from rbee.errors import SetupProblem

DOWNLOAD_LIMIT_S = 600


def contents(known: Distribution, target: Target, cache: Path, *, online: bool) -> list[Item]:
    """Return the files of a distribution for a host. Raises: SetupProblem when no build of it fits."""
    fitting = target.tags()
    if editable_folder(known) or built_for(known).intersection(fitting):
        return installed(known)
    folder = cache / "wheels"
    folder.mkdir(exist_ok=True)
    wheel = _stored(known, fitting, folder)
    if wheel is None and online and not _source(known):
        _download(known, target, folder)
        wheel = _stored(known, fitting, folder)
    if wheel is None:
        raise _no_wheel(known, target, folder, f"{folder} has no wheel that does")
    return in_wheel(wheel)


def _source(known: Distribution) -> str:
    """Return what a distribution was built from, if not from an index: there its name may be a stranger's (PEP 610)."""
    return str(json.loads(known.read_text("direct_url.json") or "{}").get("url", ""))


def built_for(known: Distribution) -> set[Tag]:
    """Return the tags that an installed distribution was built for."""
    lines = (known.read_text("WHEEL") or "Tag: py3-none-any").splitlines()
    return {tag for line in lines if line.startswith("Tag:") for tag in parse_tag(line[4:].strip())}


def _stored(known: Distribution, fitting: list[Tag], folder: Path) -> Path | None:
    """Return the best wheel of exactly this version in a folder."""
    ranked: list[tuple[int, Path]] = []
    for wheel in sorted(folder.glob("*.whl")):
        try:
            name, version, _, tags = parse_wheel_filename(wheel.name)
        except InvalidWheelFilename:
            continue
        if name == canonicalize_name(known.name) and version == Version(known.version) and tags.intersection(fitting):
            ranked.append((min(fitting.index(tag) for tag in tags.intersection(fitting)), wheel))
    return min(ranked)[1] if ranked else None


def _download(known: Distribution, target: Target, folder: Path) -> None:
    """Have pip fetch the wheel. Every platform is named: with only one pip silently takes an older version."""
    if find_spec("pip") is None:
        raise _no_wheel(known, target, folder, "this Python has no pip to download one with")
    abi = "cp{}{}".format(*target.version)
    platforms = [argument for name in target.platforms() for argument in ("--platform", name)]
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"),
        *("--only-binary=:all:", "--implementation", "cp", "--python-version", target.python),
        *("--abi", abi, "--abi", "abi3", "--abi", "none", *platforms, "--dest", str(folder)),
        f"{known.name}=={known.version}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise _no_wheel(known, target, folder, f"pip did not finish within {DOWNLOAD_LIMIT_S} s") from None
    if done.returncode:
        raise _no_wheel(known, target, folder, (done.stderr.strip().splitlines() or ["pip failed"])[-1])


def _no_wheel(known: Distribution, target: Target, folder: Path, reason: str) -> SetupProblem:
    kind = f"Python {target.python} on {target.machine}"
    source = _source(known)
    what = f"./{source.rstrip('/').rpartition('/')[2]}" if source else f"'{known.name}=={known.version}'"
    return SetupProblem(
        f"{known.name} {known.version} as installed on this machine does not fit {kind}, and {reason}",
        hint=f"on such a machine: pip wheel --no-deps {what}; copy the wheel into {folder}",
    )
