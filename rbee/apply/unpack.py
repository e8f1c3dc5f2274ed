"""Put a release in place on a host. It is sent as text over ssh, so it needs the standard library alone.

Layers lie once under ROOT/layers/SHA256; ROOT/releases/ID holds links into them, `bin` and release.json.
"""

from __future__ import annotations

import compileall
import contextlib
import ctypes
import glob
import gzip
import hashlib
import importlib.util
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from typing import IO, Any

CHUNK = 1 << 20
CHECK_LIMIT_S = 120
NOBODY = 65534


class Damaged(Exception):
    """A release cannot be put in place; the message is for a person. What was there before still stands."""


def lacking(root: str, manifest: dict[str, Any]) -> list[str]:
    """Return the SHA-256 of each layer that this host has yet to be sent."""
    named = [layer["sha256"] for layer in manifest["layers"]]
    return [sha256 for sha256 in named if not os.path.isdir(f"{root}/layers/{sha256}")]


def receive(root: str, stream: IO[bytes]) -> str:
    """Read a manifest and layers (`rbee.apply.release.stream`), put the release in place, and return its id.

    Whole layers stay when the stream ends early, so that only the rest is sent again. Raises: Damaged.
    """
    order = json.loads(stream.readline())
    manifest = order["manifest"]
    layers = {layer["sha256"]: layer for layer in manifest["layers"]}
    os.umask(0o022)
    for sha256 in order["sent"]:
        unpack(root, layers[sha256], stream)
    if still := lacking(root, manifest):
        raise Damaged(f"the release {manifest['id']} came without {len(still)} of its layers, {still[0]} first")
    assemble(root, manifest)
    return str(manifest["id"])


def unpack(root: str, layer: dict[str, Any], stream: IO[bytes]) -> None:
    """Unpack one archive to ROOT/layers/SHA256, or leave nothing of it. Raises: Damaged."""
    place, fresh = f"{root}/layers/{layer['sha256']}", f"{root}/layers/.{layer['sha256']}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    os.makedirs(fresh)
    try:
        packed = _Reader(stream, layer["packed_bytes"])
        unpacked = _Reader(gzip.GzipFile(fileobj=packed), layer["bytes"])  # type: ignore[call-overload]
        with tarfile.open(fileobj=unpacked, mode="r|") as archive:  # type: ignore[call-overload]
            for member in archive:
                _write(fresh, member, archive)
        while unpacked.read(CHUNK) or packed.read(CHUNK):
            pass
        if unpacked.sha256.hexdigest() != layer["sha256"]:
            raise Damaged("its SHA-256 is not the one it was sent under")
        if not os.path.isdir(place):
            _sync(fresh)
            os.rename(fresh, place)
    except (OSError, EOFError, tarfile.TarError, zlib.error, Damaged) as problem:
        raise Damaged(
            f"the layer {layer['name']} did not unpack: {problem}. Try: rbee apply again; if it stays so, delete "
            f"releases/{layer['sha256']}.tar.gz in rbee's cache folder on the machine that sent it"
        ) from problem
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


class _Reader:
    """A file of a known length to read from, which hashes what passes."""

    def __init__(self, inner: IO[bytes], length: int) -> None:
        self._inner, self._left = inner, length
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        size = self._left if size < 0 else min(size, self._left)
        data = self._inner.read(size) if size else b""
        if size and not data:
            raise EOFError("it ends early")
        self._left -= len(data)
        self.sha256.update(data)
        return data


def _write(folder: str, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
    """Write one file below a folder. Layers hold plain files alone, so anything else is an attack or damage."""
    parts = member.name.split("/")
    content = archive.extractfile(member) if member.isreg() else None
    if content is None or ".." in parts or "" in parts:
        raise Damaged(f"it holds {member.name!r}, which is no plain file below its folder")
    path = os.path.join(folder, *parts)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb") as file:
        shutil.copyfileobj(content, file, CHUNK)
        os.fchmod(file.fileno(), 0o755 if member.mode & 0o100 else 0o644)


def assemble(root: str, manifest: dict[str, Any]) -> None:
    """Make ROOT/releases/ID from layers that are there, once it has passed its own check. Raises: Damaged."""
    place, fresh = f"{root}/releases/{manifest['id']}", f"{root}/releases/.{manifest['id']}.tmp"
    if os.path.isdir(place):
        return
    shutil.rmtree(fresh, ignore_errors=True)
    for name, text in {**manifest["files"], "release.json": json.dumps(manifest, indent=1)}.items():
        os.makedirs(os.path.dirname(f"{fresh}/{name}"), exist_ok=True)
        with open(f"{fresh}/{name}", "x", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o755 if name.startswith("bin/") else 0o644)
    for name, target in manifest["links"].items():
        os.makedirs(os.path.dirname(f"{fresh}/{name}"), exist_ok=True)
        os.symlink(target, f"{fresh}/{name}")
    try:
        _compile(root, manifest)
        _check(fresh, manifest)
        _sync(fresh)
        os.rename(fresh, place)
        _sync(root)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _compile(root: str, manifest: dict[str, Any]) -> None:
    """Compile modules for this Python where the sender's was another; services may not write them later."""
    magic = importlib.util.MAGIC_NUMBER.hex()
    for layer in manifest["layers"] if magic != manifest["pyc"] else ():
        folder = f"{root}/layers/{layer['sha256']}"
        if not os.path.exists(f"{folder}/.compiled-{magic}"):
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            compileall.compile_dir(f"{folder}/site", quiet=2, invalidation_mode=mode)
            open(f"{folder}/.compiled-{magic}", "x").close()


def _check(folder: str, manifest: dict[str, Any]) -> None:
    """Load what the release is for, as a user without rights: a host may lack a library, or lock /opt."""
    who: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    command = [f"{folder}/bin/rbee-python", "-c", manifest["check"]]
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/nonexistent"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd="/",
            capture_output=True,
            timeout=CHECK_LIMIT_S,
            stdin=subprocess.DEVNULL,
            **who,
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise Damaged(f"the release {manifest['id']} does not start on this host: {problem}") from problem
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = said[-1] if said else f"exit status {done.returncode}"
        raise Damaged(f"the release {manifest['id']} does not work on this host: {reason}")


def _sync(folder: str) -> None:
    """Have everything that was written to this folder's file system on its disk (syncfs(2))."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None).syncfs(descriptor):
            os.sync()
    finally:
        os.close(descriptor)


def collect(root: str, keep: list[str]) -> list[str]:
    """Delete releases and layers that are neither in `keep`, nor current, nor of a running process; return them.

    What an interrupted transfer left goes too, so nobody else may be unpacking: the caller holds the host's lock.
    """
    used = _in_use(root)
    with contextlib.suppress(OSError):
        used.add(os.path.basename(os.readlink(f"{root}/current")))
    used.update(keep)
    gone = [path for path in sorted(glob.glob(f"{root}/releases/[!.]*")) if os.path.basename(path) not in used]
    for path in gone:
        shutil.rmtree(path)
    for path in glob.glob(f"{root}/releases/*/release.json"):
        with open(path, encoding="utf-8") as file:
            used.update(layer["sha256"] for layer in json.load(file)["layers"])
    unused = [path for path in sorted(glob.glob(f"{root}/layers/[!.]*")) if os.path.basename(path) not in used]
    for path in unused + glob.glob(f"{root}/*/.*.tmp"):
        shutil.rmtree(path)
    return [os.path.relpath(path, root) for path in gone + unused]


def _in_use(root: str) -> set[str]:
    """Return the ids of releases and layers that running processes name or have mapped.

    The command line names the release (`bin/rbee-python`) and is open to all; a container's root may not read the rest.
    """
    named = re.compile(re.escape(os.fsencode(os.path.realpath(root))) + rb"/(?:releases|layers)/([0-9a-f]+)")
    found: set[str] = set()
    for name in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/maps"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError), open(name, "rb") as file:
            found.update(match.decode() for match in named.findall(file.read()))
    return found


def main(arguments: list[str]) -> int:
    """`lacking ROOT` (a manifest on stdin), `receive ROOT` (a stream on stdin) or `collect ROOT ID…`; answers JSON."""
    verb, root, *ids = arguments
    try:
        if verb == "lacking":
            answer: object = lacking(root, json.load(sys.stdin))
        else:
            answer = receive(root, sys.stdin.buffer) if verb == "receive" else collect(root, ids)
    except (Damaged, OSError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 1
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
