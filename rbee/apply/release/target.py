"""What kind of machine a release is for, and which wheels fit it."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator

from msgspec import Struct
from packaging import tags
from packaging.markers import default_environment

from rbee.errors import SetupProblem

OLDEST_PYTHON = (3, 11)
OLDEST_GLIBC = {"x86_64": 5, "aarch64": 17}
ALIASES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}


class Target(Struct, frozen=True, kw_only=True):
    """What a host says of itself: `sys.version_info`, `platform.machine()`, `platform.libc_ver()`, its interpreter.

    `python` is "MAJOR.MINOR", `libc` is "glibc 2.36" or empty when unknown. `cpu_flags` are those of /proc/cpuinfo,
    empty when unknown.
    """

    python: str
    machine: str = "x86_64"
    libc: str = ""
    interpreter: str = "/usr/bin/python3"
    cpu_flags: frozenset[str] = frozenset()

    def check(self) -> None:
        """Raise: SetupProblem when rbee cannot run on such a machine."""
        if not re.fullmatch(r"\d+\.\d+", self.python) or self.version < OLDEST_PYTHON:
            raise SetupProblem(
                f"The host has Python {self.python}, rbee needs {'.'.join(map(str, OLDEST_PYTHON))} or newer",
                hint="install a newer one on the host and name it in the inventory: RbeePython python3.12",
            )
        if self.libc and not self.glibc:
            raise SetupProblem(
                f"The host's C library is {self.libc!r}; the engines' wheels need glibc",
                hint="a distribution with glibc (Debian, Ubuntu, Fedora, Arch, openSUSE …)",
            )

    @property
    def version(self) -> tuple[int, int]:
        """The (major, minor) of the host's Python."""
        major, minor = self.python.split(".")
        return int(major), int(minor)

    @property
    def glibc(self) -> tuple[int, int] | None:
        """The (major, minor) of the host's glibc, or None when unknown."""
        found = re.fullmatch(r"glibc (\d+)\.(\d+).*", self.libc)
        return (int(found[1]), int(found[2])) if found else None

    def is_this_machines_kind(self) -> bool:
        """Tell whether shared libraries of this machine load there."""
        return sys.platform == "linux" and platform.machine() == self.machine

    def markers(self) -> dict[str, str]:
        """Return the values of PEP 508 markers on the host."""
        here: dict[str, str] = {name: str(value) for name, value in default_environment().items()}
        there = {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }
        return {**here, **there}

    def platforms(self) -> list[str]:
        """Return the platform tags that load there, best first (PEP 600)."""
        oldest = OLDEST_GLIBC.get(self.machine, 17)
        newest = (self.glibc or (2, 28))[1]
        names = [name for minor in range(newest, oldest - 1, -1) for name in _manylinux(minor)]
        return [f"{name}_{self.machine}" for name in (*names, "linux")]

    def tags(self) -> list[tags.Tag]:
        """Return the wheel tags that fit the host, best first (PEP 425)."""
        platforms = self.platforms()
        interpreter = "cp{}{}".format(*self.version)
        return [
            *tags.cpython_tags(self.version, abis=[interpreter], platforms=platforms),
            *tags.compatible_tags(self.version, interpreter, platforms=platforms),
        ]


def _manylinux(minor: int) -> Iterator[str]:
    yield f"manylinux_2_{minor}"
    if minor in ALIASES:
        yield ALIASES[minor]
