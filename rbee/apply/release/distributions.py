"""Which distributions a host needs: the requirements of its roles and backends, as installed on this machine."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution, entry_points
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rbee.errors import PluginProblem, SetupProblem
from rbee.plugin import ENTRY_POINT_GROUP


def roots(roles: Iterable[str], backends: Iterable[str]) -> list[Requirement]:
    """Return what a host of these roles and backends asks for, in a fixed order. Raises: PluginProblem."""
    extras = ",".join(sorted(roles))
    return [Requirement(f"rbee[{extras}]" if extras else "rbee"), *map(_plugin, sorted(backends))]


def _plugin(backend: str) -> Requirement:
    found = {entry.name: entry.dist for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.dist}
    if backend not in found:
        raise PluginProblem(
            f"The backend {backend!r} is not installed on this machine, which hosts get it from; "
            f"installed: {', '.join(sorted(found)) or 'none'}",
            hint=f"pip install rbee-{backend}",
        )
    return Requirement(found[backend].name)


def closure(wanted: Iterable[Requirement], environment: Mapping[str, str]) -> list[Distribution]:
    """Return every distribution that these requirements lead to, by name.

    `environment` are the values of PEP 508 markers on the host. Raises: SetupProblem for one that this machine lacks.
    """
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(requirement, "rbee apply") for requirement in wanted]
    while waiting:
        requirement, asker = waiting.pop()
        name = canonicalize_name(requirement.name)
        known = found[name] = found.get(name) or _installed(requirement, asker)
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += [(needed, name) for needed in _requires(known, extra, environment)]
    return [found[name] for name in sorted(found)]


def _installed(requirement: Requirement, asker: str) -> Distribution:
    try:
        found = distribution(requirement.name)
    except PackageNotFoundError:
        raise SetupProblem(
            f"This machine lacks {requirement.name}, which {asker} needs on the host; its packages come from here",
            hint=f"pip install '{requirement.name}{requirement.specifier}'",
        ) from None
    if not requirement.specifier.contains(found.version, prereleases=True):
        raise SetupProblem(
            f"This machine has {found.name} {found.version}, but {asker} needs {requirement.specifier}",
            hint=f"pip install '{requirement.name}{requirement.specifier}'",
        )
    return found


def _requires(known: Distribution, extra: str, environment: Mapping[str, str]) -> list[Requirement]:
    """Return what a distribution needs on the host when it is asked for with an extra, or without (empty)."""
    project = pyproject(known)
    texts = known.requires or [] if project is None else [text for texts in project.values() for text in texts]
    values = {**environment, "extra": extra}
    found = [Requirement(text) for text in texts]
    return [one for one in found if one.marker is None or one.marker.evaluate(values)]


def pyproject(known: Distribution) -> dict[str, list[str]] | None:
    """Return the requirements of an editable install, by extra and in the form of its metadata (empty: always).

    They are read from its pyproject.toml: the installed metadata may be older. None where that file does not tell.
    """
    folder = editable_folder(known)
    project = project_file(folder).get("project", {}) if folder else {}
    if not project or {"dependencies", "optional-dependencies"} & set(project.get("dynamic", [])):
        return None
    found: dict[str, list[str]] = {"": project.get("dependencies", [])}
    for extra, texts in project.get("optional-dependencies", {}).items():
        found[canonicalize_name(extra)] = [_with_extra(text, canonicalize_name(extra)) for text in texts]
    return found


def project_file(folder: Path) -> dict[str, Any]:
    """Return what a checkout's pyproject.toml says; nothing when it has none."""
    file = folder / "pyproject.toml"
    return tomllib.loads(file.read_text("utf-8")) if file.is_file() else {}


def _with_extra(text: str, extra: str) -> str:
    requirement, _, marker = text.partition(";")
    return (
        f"{requirement.strip()}; ({marker.strip()}) and extra == '{extra}'" if marker else f"{text}; extra == '{extra}'"
    )


def editable_folder(known: Distribution) -> Path | None:
    """Return the checkout that an editable install points to (PEP 610), or None for any other install."""
    text = known.read_text("direct_url.json")
    told = json.loads(text) if text else {}
    if not told.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlsplit(told["url"]).path))
