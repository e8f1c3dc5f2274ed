"""A fleet for tests of the queen: an authority, an inventory folder, and hosts in it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet_certificates import make_authority

from rbee.inventory.keywords import IGNORE_UNKNOWN
from rbee.testing.fleet import RunningHive, running_hive
from rbee.testing.programs import RunningQueen, until
from rbee.tokens import derived_token
from rbee.wire.fleet import HiveView
from rbee.wire.settings import QueenSettings, dump_settings

SECRET = "a fleet's secret, for tests only"


@dataclass
class FleetFolder:
    """An inventory folder with its identity."""

    folder: Path

    def __post_init__(self) -> None:
        self.identity = self.folder / ".rbee"
        self.authority = make_authority(self.identity)
        (self.identity / "fleet.key").write_text(SECRET + "\n")

    @property
    def file(self) -> Path:
        return self.folder / "hives.conf"

    def write(self, **hosts: int | list[str]) -> None:
        """Write the inventory: each host's port on 127.0.0.1, or its own lines."""
        text = f"IgnoreUnknown {IGNORE_UNKNOWN}\n"
        for name, told in hosts.items():
            lines = ["HostName 127.0.0.1", f"HivePort {told}"] if isinstance(told, int) else told
            text += f"\nHost {name.replace('_', '-')}\n" + "".join(f"    {line}\n" for line in lines)
        self.file.write_text(text)

    def credentials(self, name: str, *addresses: str) -> Path:
        """Make the certificate of a host that is reached at these addresses, and return its folder."""
        return self.authority.host(self.folder.parent / name, (name, *(addresses or ("127.0.0.1", "127.0.0.2"))))

    @contextmanager
    def hive(self, name: str, **options: Any) -> Iterator[RunningHive]:
        """Run a hive of this name."""
        credentials = options.pop("credentials", None) or self.credentials(name)
        token = options.pop("token", "") or derived_token(SECRET, "hive", name)
        with running_hive(name, token, credentials, **options) as hive:
            yield hive


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def settings_file(folder: Path, fleet: FleetFolder, **more: object) -> str:
    """Write the settings of a queen that `rbee apply` set up, and return the file."""
    settings = QueenSettings(host="127.0.0.1", port=free_port(), inventory=str(fleet.folder), **more)  # type: ignore[arg-type]
    (folder / "queen.yaml").write_text(dump_settings(settings))
    return str(folder / "queen.yaml")


def view(queen: RunningQueen, name: str) -> HiveView | None:
    """Return how the queen sees a hive."""
    return next((hive for hive in queen.status().hives if hive.hive == name), None)


def until_state(queen: RunningQueen, name: str, state: str) -> HiveView:
    """Wait until the queen sees a hive in this state."""
    until(lambda: (found := view(queen, name)) and found.state == state, f"{name} to be {state}")
    found = view(queen, name)
    assert found is not None
    return found
