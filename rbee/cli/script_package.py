"""A routing script that is shared: one file with a manifest and a signature.

    // rbee-script: name=eu-only, version=1.2.0, requires=rbee>=0.1
    fn route_task(task, workers) { … }
    // rbee-signature: ed25519 PUBLIC-KEY SIGNATURE

Key and signature are Base64 (RFC 4648, 4); Ed25519 (RFC 8032) signs all bytes before the last line, behind a prefix of
our own so that no other signature can stand for one. Both lines are comments to Rhai.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from rbee import __version__
from rbee.cli.needs import need
from rbee.errors import InvalidInput, InvalidScript, SetupProblem
from rbee.paths import private, write_private

MAX_BYTES = 65_536
MAGIC = b"rbee-script-v1\0"
MANIFEST, SIGNATURE = "// rbee-script:", "// rbee-signature: ed25519 "
NAME = r"[a-z0-9][a-z0-9-]{0,63}"

ScriptName = Annotated[str, Meta(pattern=f"^{NAME}$")]


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the first line says. `requires` is a version specifier, such as `rbee>=0.1` (PEP 508)."""

    name: ScriptName
    version: Annotated[str, Meta(pattern=r"^\d+(\.\d+){0,3}$")]
    requires: Annotated[str, Meta(pattern=r"^(rbee[ <>=!~\d.|]*)?$")] = ""

    def line(self) -> str:
        """Return the line that says it."""
        pairs = {"name": self.name, "version": self.version, "requires": self.requires}
        return f"{MANIFEST} " + ", ".join(f"{key}={value}" for key, value in pairs.items() if value)

    def check(self) -> None:
        """Raise InvalidScript when this rbee is not what the script needs."""
        from packaging.requirements import InvalidRequirement, Requirement

        try:
            met = not self.requires or Requirement(self.requires).specifier.contains(__version__, prereleases=True)
        except InvalidRequirement:
            raise InvalidScript(
                f"The script {self.name} has a `requires` that cannot be read: {self.requires}"
            ) from None
        if not met:
            raise InvalidScript(f"The script {self.name} needs {self.requires}; this is rbee {__version__}")


class Package(Struct, frozen=True, kw_only=True):
    """A shared script: its whole text, and whose key signed it (empty: nobody's)."""

    text: str
    manifest: Manifest
    key: bytes = b""

    @property
    def fingerprint(self) -> str:
        """Return the key as a person compares it, in OpenSSH's form."""
        return fingerprint(self.key) if self.key else ""


def read(text: str, where: str) -> Package:
    """Return the package in a file's text, its signature checked.

    Raises: InvalidScript for a manifest that is missing or wrong, and for a signature that does not fit.
    """
    manifest = _manifest(text, where)
    body, _, last = text.rstrip("\n").rpartition("\n")
    if not last.startswith(SIGNATURE.rstrip()):
        return Package(text=text, manifest=manifest)
    return Package(text=text, manifest=manifest, key=_signed_by(f"{body}\n", last, where))


def sign(text: str, manifest: Manifest, private_key: bytes) -> str:
    """Return a script's text with this manifest, signed; a manifest and a signature that it has are replaced."""
    need("cryptography", "apply")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    lines = [line for line in text.splitlines() if not line.startswith((MANIFEST, SIGNATURE.rstrip()))]
    body = "\n".join([manifest.line(), *lines]) + "\n"
    key = Ed25519PrivateKey.from_private_bytes(private_key)
    words = (base64.b64encode(part).decode() for part in (_public(private_key), key.sign(MAGIC + body.encode())))
    return f"{body}{SIGNATURE}{' '.join(words)}\n"


def fingerprint(key: bytes) -> str:
    """Return a public key's fingerprint as OpenSSH writes those of its own keys."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")


def signing_key(path: Path) -> bytes:
    """Return the private key (32 bytes) that is kept in a file, making one when there is none. Raises: SetupProblem."""
    if not path.exists():
        private(path.parent)
        write_private(path, base64.b64encode(os.urandom(32)) + b"\n")
    try:
        key = base64.b64decode(path.read_bytes().strip(), validate=True)
    except binascii.Error:
        key = b""
    if len(key) != 32:
        raise SetupProblem(f"{path} does not hold a signing key", hint="another file, with --key")
    return key


def public_fingerprint(private_key: bytes) -> str:
    """Return the fingerprint of the public half."""
    return fingerprint(_public(private_key))


class Trusted(Struct, kw_only=True):
    """Whose scripts are taken: keys by fingerprint, and which key each installed script had."""

    keys: dict[str, str] = {}
    """Fingerprint → the script with which it was first trusted."""
    scripts: dict[str, str] = {}
    """Name → fingerprint."""

    def changed(self, package: Package) -> str:
        """Return the fingerprint that a script of this name had, when it is another one than now."""
        before = self.scripts.get(package.manifest.name, "")
        return before if before and before != package.fingerprint else ""

    def trust(self, package: Package) -> None:
        """Take this key for this script, and for others."""
        self.keys.setdefault(package.fingerprint, package.manifest.name)
        self.scripts[package.manifest.name] = package.fingerprint


def read_trusted(path: Path) -> Trusted:
    """Read whose scripts are taken. Raises: SetupProblem: a damaged file must not mean that nobody was known."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Trusted)
    except FileNotFoundError:
        return Trusted()
    except msgspec.DecodeError as problem:
        raise SetupProblem(
            f"{path} cannot be read ({problem})", hint="put it right, or remove it to begin anew"
        ) from None


def write_trusted(path: Path, trusted: Trusted) -> None:
    """Keep whose scripts are taken."""
    private(path.parent)
    write_private(path, msgspec.json.format(msgspec.json.encode(trusted), indent=2))


def _manifest(text: str, where: str) -> Manifest:
    first = text.partition("\n")[0]
    if not first.startswith(MANIFEST):
        raise InvalidScript(
            f"{where}:1: the first line is no manifest", hint=f"{MANIFEST} name=NAME, version=1.0, requires=rbee>=0.1"
        )
    try:
        return manifest_of(pairs(first))
    except InvalidInput as problem:
        raise InvalidScript(f"{where}:1: {problem.message}") from None


def pairs(line: str) -> dict[str, str]:
    """Return the words of a manifest's line. Raises: InvalidInput."""
    return dict(_pair(part) for part in line.removeprefix(MANIFEST).split(",") if part.strip())


def manifest_of(pairs: Mapping[str, str]) -> Manifest:
    """Return the manifest that these words make. Raises: InvalidInput."""
    try:
        return msgspec.convert(dict(pairs), Manifest)
    except msgspec.ValidationError as problem:
        what = re.sub(r"`\$\.(\w+)`", r"`\1`", str(problem))
        raise InvalidInput(f"the manifest is wrong: {what}") from None


def _pair(part: str) -> tuple[str, str]:
    key, found, value = part.partition("=")
    if not found:
        raise InvalidInput(f"the manifest is wrong: {part.strip()!r} is no NAME=VALUE")
    return key.strip(), value.strip()


def _signed_by(body: str, line: str, where: str) -> bytes:
    """Return the key that signed. Raises: InvalidScript."""
    need("cryptography", "apply")
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        words = line.removeprefix(SIGNATURE).split(" ")
        key, signature = (base64.b64decode(word, validate=True) for word in words)
        Ed25519PublicKey.from_public_bytes(key).verify(signature, MAGIC + body.encode())
    except (ValueError, binascii.Error):
        raise InvalidScript(f"{where}: the signature in its last line cannot be read") from None
    except InvalidSignature:
        raise InvalidScript(
            f"{where}: the signature does not fit: the script was changed after it was signed"
        ) from None
    return key


def _public(private_key: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()
