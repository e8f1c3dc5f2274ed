"""maturin's build hooks (PEP 517), with the Rust toolchain found where the `cargo` on PATH says it is.

rustup's `cargo` looks for its toolchains in ~/.rustup. Where the build runs with another HOME than the one that Rust
was installed in (sudo, a build container, an empty test home), it finds none, although it lies right beside them.
"""

import os
import shutil
from pathlib import Path

from maturin import (  # the hooks that a front end calls
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def _find_toolchains() -> None:
    cargo = shutil.which("cargo")
    if cargo is None or "RUSTUP_HOME" in os.environ or _toolchains(Path.home()):
        return
    # rustup installs to SOMEWHERE/.cargo/bin and SOMEWHERE/.rustup.
    somewhere = Path(cargo).parent.parent.parent
    if _toolchains(somewhere):
        os.environ["RUSTUP_HOME"] = str(somewhere / ".rustup")


def _toolchains(home: Path) -> list[Path]:
    return list((home / ".rustup" / "toolchains").glob("*"))


_find_toolchains()
