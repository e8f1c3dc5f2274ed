"""The host keys that an inventory pins: a file in the form of known_hosts (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT)."""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import hmac
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from msgspec import Struct

from rbee.inventory.lexing import in_list
from rbee.paths import write_private


class Pin(Struct, frozen=True):
    """One line: for which host names, of what type, and the key itself in base64."""

    hosts: str
    type: str
    key: str
    marker: str = ""

    @property
    def fingerprint(self) -> str:
        """The key's fingerprint, as ssh shows it."""
        try:
            digest = hashlib.sha256(base64.b64decode(self.key, validate=True)).digest()
        except (binascii.Error, ValueError):
            return "not a key"
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    def covers(self, name: str) -> bool:
        """Tell whether the line is for this host name."""
        if self.hosts.startswith("|1|"):
            return _hashed(self.hosts, name)
        return in_list(name.lower(), self.hosts.lower())


def name_of(values: Mapping[str, list[str]]) -> str:
    """Return the name under which ssh keeps a host's key, from what `ssh -G` says."""
    alias = values.get("hostkeyalias", ["none"])[0]
    if alias != "none":
        return alias.lower()
    hostname, port = values["hostname"][0].lower(), values["port"][0]
    return hostname if port == "22" else f"[{hostname}]:{port}"


def pins(text: str, name: str) -> list[Pin]:
    """Return the lines of a file that are for a host name."""
    return [pin for line in text.splitlines() if (pin := read_pin(line)) is not None and pin.covers(name)]


def read_pin(line: str) -> Pin | None:
    """Return what a line says, or None for a comment or what is no key."""
    words = line.split()
    marker = words.pop(0) if words and words[0].startswith("@") else ""
    if len(words) < 3 or words[0].startswith("#"):
        return None
    return Pin(words[0], words[1], words[2], marker)


def without(text: str, name: str) -> str:
    """Return a file's text without the keys of a host; rules for several hosts (`@cert-authority`, …) stay."""
    kept = []
    for line in text.splitlines(keepends=True):
        pin = read_pin(line)
        if pin is None or pin.marker or not pin.covers(name):
            kept.append(line)
    return "".join(kept)


def read_text(path: Path) -> str:
    """Return the file's text; one that is not there yet is empty."""
    return path.read_text(errors="surrogateescape") if path.exists() else ""


def change(path: Path, edit: Callable[[str], str]) -> None:
    """Replace the file's text in one step, so that two changes at once do not lose one."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        old = read_text(path)
        new = edit(old)
        if new != old:
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
            write_private(path, new.encode(errors="surrogateescape"))
            path.chmod(mode)
    finally:
        os.close(folder)


def _hashed(hosts: str, name: str) -> bool:
    try:
        _, _, salt, found = hosts.split("|")
        digest = hmac.new(base64.b64decode(salt), name.encode(), hashlib.sha1).digest()
        return hmac.compare_digest(digest, base64.b64decode(found))
    except (ValueError, binascii.Error):
        return False
