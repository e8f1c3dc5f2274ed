"""The one ssh_config that stands for a whole inventory: what `ssh -F` is given."""

from __future__ import annotations

from pathlib import Path

from rbee.inventory.fleet import At, Fleet
from rbee.inventory.keywords import IGNORE_UNKNOWN
from rbee.inventory.parse import parse
from rbee.inventory.world import World, this_machine
from rbee.paths import private, write_private

PERSONAL = ("~/.ssh/config", "/etc/ssh/ssh_config")


def ssh_config_text(fleet: Fleet, world: World | None = None) -> str:
    """Return the text for `ssh -F`. Bytes that are no UTF-8 are kept as `surrogateescape` has them.

    The first value wins, so the order decides:
    1. `IgnoreUnknown`, or ssh refuses rbee's keywords. It takes in what the person's files name there, for theirs
       comes too late to count.
    2. The policy for host keys, so that no file can weaken it: only keys in the inventory's `known_hosts` count (and
       in the machine's own /etc/ssh/ssh_known_hosts, which its administrator keeps), and nothing is added in silence.
    3. The inventory's files, word for word. An `Include` of them would fail where they are writable for a group, as
       every new file is under umask 002, though `ssh -F` reads such a file itself.
    4. The person's and the machine's files, which `-F` would leave out: identity files, jump hosts, proxies.
    """
    return "".join(f"{line}\n" for line, _ in ssh_config_lines(fleet, world or this_machine()))


def ssh_config_lines(fleet: Fleet, world: World) -> list[tuple[str, At | None]]:
    """Return the lines of that text, each with the line of the inventory that it is, or None."""
    found: list[tuple[str, At | None]] = [(line, None) for line in _policy(fleet, world)]
    for file in fleet.files:
        text = file.read_bytes().decode(errors="surrogateescape")
        found += [("", None), (f"# {file.absolute()}", None), ("Match all", None)]
        found += [(line, At(str(file), number)) for number, line in enumerate(text.removesuffix("\n").split("\n"), 1)]
    return [*found, ("", None), ("Match all", None), *((f"Include {file}", None) for file in PERSONAL)]


def write_ssh_config(fleet: Fleet, world: World | None = None) -> Path:
    """Write the text into the inventory's `.rbee` folder, which git leaves out, and return its path."""
    folder = private(fleet.folder / ".rbee")
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
    path = folder / "ssh_config"
    data = ssh_config_text(fleet, world).encode(errors="surrogateescape")
    if not path.exists() or path.read_bytes() != data:
        write_private(path, data)
    return path


def known_hosts(fleet: Fleet) -> Path:
    """Return the file of the host keys that count."""
    return fleet.folder / "known_hosts"


def _policy(fleet: Fleet, world: World) -> list[str]:
    return [
        "# Made by rbee from the files named below; change those.",
        f"IgnoreUnknown {_ignored(fleet, world)}",
        f"UserKnownHostsFile {_quoted(str(known_hosts(fleet)))}",
        "StrictHostKeyChecking yes",
        "UpdateHostKeys no",
        "VerifyHostKeyDNS no",
        "CheckHostIP no",
        "HashKnownHosts no",
    ]


def _ignored(fleet: Fleet, world: World) -> str:
    personal = [Path(world.home + file.removeprefix("~") if file.startswith("~") else file) for file in PERSONAL]
    config = parse([*fleet.files, *(file for file in personal if file.is_file())], world)
    more = [word for line in config.lines if line.keyword == "ignoreunknown" for word in line.words]
    return ",".join(dict.fromkeys(",".join([IGNORE_UNKNOWN, *more]).split(",")))


def _quoted(path: str) -> str:
    # Tokens are expanded in this value (ssh_config(5), TOKENS).
    return '"' + path.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"') + '"'
