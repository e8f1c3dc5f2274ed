"""Cases as data: a `.case` file is an inventory and what it must mean.

    Host box                        the file main.conf of the inventory's folder
    ==== file ~/.ssh/more.conf      further files: under ~, or beside main.conf
    ==== expected
    {"ssh": …, "hosts": …}          or {"ssh": …, "mistakes": […]}

`ssh` says whether `ssh -G -F main.conf` accepts the files. Of a host only what differs from the defaults is listed.
The reader of the files is called vince, and the machine desk. `python inventory_cases.py NAME…` writes what the code
says into cases; read it before you keep it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rbee.errors import InvalidInventory, Mistake
from rbee.inventory import read
from rbee.inventory.world import World, this_machine

CASES = Path(__file__).parent / "cases"
MARK = re.compile(rb"^==== (file .+|expected)\n", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """A case that lies in a folder of its own: `root/inventory/main.conf` and `root/home`."""

    root: Path
    main: Path

    @property
    def world(self) -> World:
        """The reader of the files."""
        run = this_machine().run
        home = str(self.root / "home")
        return World(home=home, user="vince", user_id=os.getuid(), machine="desk", run=run)

    def outcome(self, ssh: bool | None) -> dict[str, Any]:
        """Return what the inventory means, in the form of `expected`."""
        found: dict[str, Any]
        try:
            fleet = read(self.main, self.world)
        except InvalidInventory as problem:
            found = {"mistakes": self._plain(problem.mistakes), "warnings": self._plain(problem.warnings)}
        else:
            hosts = {host.name: dict(self._changed(msgspec.to_builtins(host))) for host in fleet.hosts}
            found = {"hosts": hosts, "warnings": self._plain(fleet.warnings)}
        return {"ssh": ssh, **{key: value for key, value in found.items() if value or key in ("hosts", "mistakes")}}

    def ssh_accepts(self) -> bool:
        """Tell whether ssh reads the file."""
        environment = {**os.environ, "HOME": str(self.root / "home")}
        words = ["ssh", "-G", "-F", str(self.main), "no-such-host"]
        return subprocess.run(words, env=environment, capture_output=True, timeout=60, check=False).returncode == 0

    def _plain(self, mistakes: tuple[Mistake, ...] | list[Mistake]) -> list[str]:
        return [
            self._short(f"{each.at}: {each.message}" + (f" | {each.hint}" if each.hint else "")) for each in mistakes
        ]

    def _short(self, text: str) -> str:
        text = text.replace(f"{self.root}/inventory/", "").replace(f"{self.root}/inventory", "FOLDER")
        return text.replace(f"{self.root}/home", "HOME")

    def _changed(self, host: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in host.items():
            if name == "origins":
                yield name, {keyword: self._place(at) for keyword, at in value.items()}
            elif name in ("workers", "models"):
                if value:
                    yield name, [dict(self._changed(line)) for line in value]
            elif name == "gitops":
                if value:
                    yield name, dict(self._changed(value))
            elif name != "at" and value != DEFAULTS.get(name, ""):
                yield name, self._short(value) if isinstance(value, str) else value

    def _place(self, at: dict[str, Any]) -> str:
        return self._short(f"{at['file']}:{at['line']}").removeprefix("main.conf:")


DEFAULTS = {"port": 22, "hive_port": 7835, "queen_port": 0, "gpus": [], "tags": [], "wave": 0, "python": "python3",
            "run_as": "rbee", "context_tokens": 0, "slots": 0, "threads": 0, "pin": False, "idle_s": 0.0,
            "start_limit_s": 0.0, "memory_bytes": 0, "options": {}, "interval_s": 60.0, "require_signed": False,
            "user": "vince", "branch": "main", "path": "inventory", "price": 0.0, "capabilities": []}  # fmt: skip


def lay_out(file: Path, root: Path) -> tuple[Case, dict[str, Any]]:
    """Write a case's files below a folder; return the case and what is expected of it."""
    main, *rest = MARK.split(file.read_bytes())
    expected: dict[str, Any] = {}
    folder = root / "inventory"
    (root / "home" / ".ssh").mkdir(parents=True)
    folder.mkdir()
    _write(folder / "main.conf", main, root)
    for mark, data in zip(rest[::2], rest[1::2], strict=True):
        if mark == b"expected":
            expected = json.loads(data)
        else:
            name = mark.removeprefix(b"file ").decode()
            _write(root / "home" / name[2:] if name.startswith("~/") else folder / name, data, root)
    return Case(root, folder / "main.conf"), expected


def _write(path: Path, data: bytes, root: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        data.replace(b"FOLDER", str(root / "inventory").encode()).replace(b"HOME", str(root / "home").encode())
    )
    # ssh refuses to include what others may write.
    path.chmod(0o600)


def rewrite(file: Path) -> None:
    """Write what the code and ssh say into a case."""
    with tempfile.TemporaryDirectory() as root:
        case, _ = lay_out(file, Path(root))
        outcome = case.outcome(case.ssh_accepts())
    kept = file.read_bytes().partition(b"==== expected\n")[0]
    text = json.dumps(outcome, indent=2, ensure_ascii=False)
    file.write_bytes(kept + b"==== expected\n" + text.encode() + b"\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        rewrite(Path(name))
