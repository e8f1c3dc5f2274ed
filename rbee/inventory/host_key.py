"""Asks a machine for its host key over the way that ssh takes to it: its address, port, proxy and jump hosts."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from msgspec import Struct

from rbee.errors import Unreachable
from rbee.inventory.fleet import Fleet
from rbee.inventory.known_hosts import Pin, pins, read_text
from rbee.inventory.openssh import ConfigFile, run_ssh
from rbee.inventory.ssh_config import known_hosts

CONNECT_TIMEOUT_S = 10
LIMIT_S = 60.0
"""For the whole way, with its jump hosts."""

PROBE = (
    "StrictHostKeyChecking=accept-new",
    "GlobalKnownHostsFile=/dev/null",
    "KnownHostsCommand=none",
    # Through a connection that stands already, no key would be seen.
    "ControlMaster=no",
    "ControlPath=none",
    # The key is known before anyone logs in.
    "PreferredAuthentications=none",
    "BatchMode=yes",
    "ClearAllForwardings=yes",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    "LogLevel=INFO",
    f"ConnectTimeout={CONNECT_TIMEOUT_S}",
    "ConnectionAttempts=1",
)


class Seen(Struct, frozen=True):
    """What a machine showed: a key that no pin speaks of, a pinned one, or another one than the pinned."""

    new: str = ""
    """The line for known_hosts, of a machine without a pinned key."""
    changed: str = ""
    """The fingerprint of a key that differs from the pinned one."""
    pinned: list[Pin] = []

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the key that was shown."""
        if self.changed:
            return self.changed
        words = self.new.split()
        return Pin(*words[:3]).fingerprint if self.new else self.pinned[0].fingerprint


def look(fleet: Fleet, config: ConfigFile, name: str, kept_as: str) -> Seen:
    """Return the key that a machine shows, compared with the pinned ones; nothing is written.

    `config` stands for the inventory, `kept_as` is the name under which ssh keeps the key. Each jump host on the way
    must be pinned already. Raises: Unreachable, SetupProblem.
    """
    before = read_text(known_hosts(fleet))
    with tempfile.TemporaryDirectory(prefix="rbee-key-") as folder:
        scratch = Path(folder) / "known_hosts"
        scratch.write_text(_ended(before), errors="surrogateescape")
        options = [f"UserKnownHostsFile={scratch}", *PROBE]
        words = [
            "-F",
            str(config.path),
            "-T",
            *(word for option in options for word in ("-o", option)),
            "--",
            name,
            "exit",
        ]
        done = run_ssh(words, LIMIT_S)
        after = read_text(scratch)
    new = [line for line in after.removeprefix(_ended(before)).splitlines() if line.strip()]
    if new:
        return Seen(new=new[0])
    if "IDENTIFICATION HAS CHANGED" in done.stderr and f"key for {kept_as}" in done.stderr:
        found = re.search(r"SHA256:[A-Za-z0-9+/]+", done.stderr)
        return Seen(changed=found[0] if found else "unknown", pinned=pins(before, kept_as))
    pinned = pins(before, kept_as)
    if pinned and (done.returncode == 0 or _turned_away(done.stderr)):
        return Seen(pinned=pinned)
    raise _unreachable(name, done.stderr)


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


def _turned_away(said: str) -> bool:
    """Tell whether the machine itself asked for a login; a jump host that does is followed by a broken connection."""
    lines = [line for line in said.splitlines() if line.strip()]
    return bool(lines) and "Permission denied (" in lines[-1]


def _unreachable(name: str, said: str) -> Unreachable:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    jump = re.search(r"No \S+ host key is known for (\S+) and you have requested strict checking", said)
    hint = (
        f"rbee hosts trust HOST for the jump host {jump[1]} first" if jump else f"ssh -v to {name}; is it switched on?"
    )
    last = "; ".join(line for line in lines if not line.startswith(("Warning:", "@")))[-400:]
    return Unreachable(f"ssh gets no key from {name}: {last or 'it said nothing'}", hint=hint)
