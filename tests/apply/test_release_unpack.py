"""The host's side of a release: whole or not at all, never a file outside its folder, nothing deleted that runs."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rbee.apply import unpack
from rbee.apply.release import Release, Target, build, stream

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="hosts run Linux")

MINOR = "{}.{}".format(*sys.version_info[:2])
# The system's own where it is of this version: as root, the check must be able to run it as `nobody`.
SYSTEM = f"/usr/bin/python{MINOR}"
TARGET = Target(
    python=MINOR,
    machine=platform.machine(),
    libc=" ".join(platform.libc_ver()),
    interpreter=SYSTEM if os.access(SYSTEM, os.X_OK) else sys.executable,
)
GUARD_S = 120


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return build(frozenset(), frozenset({"echo"}), TARGET, folder=tmp_path_factory.mktemp("cache"), online=False)


@pytest.fixture
def root() -> Iterator[Path]:
    # Not pytest's own folder: the check of a release runs as `nobody`, as the services do.
    folder = Path(tempfile.mkdtemp(prefix="rbee-root-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def sent(release: Release, *, lacking: list[str] | None = None, manifest: dict[str, Any] = {}) -> io.BytesIO:
    """Return the stream of a release with its layers, or those named, and with a changed manifest."""
    changed = Release(id=release.id, layers=release.layers, manifest={**release.manifest, **manifest})
    return io.BytesIO(b"".join(stream(changed, [one.sha256 for one in release.layers] if lacking is None else lacking)))


def stored(root: Path, what: str) -> set[str]:
    return set(os.listdir(root / what)) if (root / what).is_dir() else set()


def test_a_second_send_brings_nothing_and_changes_nothing(root: Path, release: Release) -> None:
    assert unpack.receive(str(root), sent(release)) == release.id
    assert unpack.lacking(str(root), release.manifest) == []
    before = (root / "releases" / release.id / "release.json").stat()
    assert unpack.receive(str(root), sent(release, lacking=[])) == release.id
    assert (root / "releases" / release.id / "release.json").stat() == before


def test_every_file_is_there_with_its_mode_and_readable_by_any_user(root: Path, release: Release) -> None:
    old = os.umask(0o077)
    try:
        unpack.receive(str(root), sent(release))
    finally:
        os.umask(old)
    for layer in release.layers:
        with tarfile.open(layer.path) as archive:
            for member in archive:
                path = root / "layers" / layer.sha256 / member.name
                content = archive.extractfile(member)
                assert content is not None
                assert path.read_bytes() == content.read()
                assert path.stat().st_mode & 0o777 == member.mode
                assert path.parent.stat().st_mode & 0o777 == 0o755
    links = [path for path in (root / "releases" / release.id).rglob("*") if path.is_symlink()]
    assert links
    assert all(path.exists() and not os.readlink(path).startswith("/") for path in links)


def test_a_stream_that_ends_early_keeps_its_whole_layers(root: Path, release: Release) -> None:
    data = sent(release).getvalue()
    with pytest.raises(unpack.Damaged, match=rf"layer {release.layers[-1].name} did not unpack: it ends early"):
        unpack.receive(str(root), io.BytesIO(data[:-10]))
    still = unpack.lacking(str(root), release.manifest)
    assert still == [release.layers[-1].sha256]
    assert stored(root, "releases") == set()
    assert unpack.receive(str(root), sent(release, lacking=still)) == release.id


def test_a_layer_with_other_bytes_is_refused_by_name(root: Path, release: Release) -> None:
    layer = release.layers[0]
    other = packed({"site/click/__init__.py": b"import os; os.system('evil')\n"})
    manifest = changed(release, packed_bytes=len(other), bytes=len(gzip.decompress(other)))
    said = rf"layer {layer.name} did not unpack: its SHA-256 .*releases/{layer.sha256}.tar.gz"
    with pytest.raises(unpack.Damaged, match=said):
        unpack.receive(str(root), order(manifest, layer.sha256, other))
    assert stored(root, "layers") == set()


@pytest.mark.parametrize("position", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_bit_anywhere_is_noticed(root: Path, release: Release, position: float) -> None:
    layer = release.layers[0]
    data = bytearray(layer.path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 0x10
    with pytest.raises(unpack.Damaged, match=f"layer {layer.name} did not unpack"):
        unpack.receive(str(root), order(release.manifest, layer.sha256, bytes(data)))
    assert stored(root, "layers") == set()


def packed(files: dict[str, bytes], edit: Callable[[tarfile.TarInfo], object] = lambda member: None) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            edit(member)
            archive.addfile(member, io.BytesIO(data))
    return gzip.compress(raw.getvalue())


def changed(release: Release, **values: Any) -> dict[str, Any]:
    """Return a manifest whose first layer says something else."""
    first, *others = release.manifest["layers"]
    return {**release.manifest, "layers": [{**first, **values}, *others]}


def order(manifest: dict[str, Any], sha256: str, data: bytes) -> io.BytesIO:
    return io.BytesIO(json.dumps({"manifest": manifest, "sent": [sha256]}).encode() + b"\n" + data)


def as_link(member: tarfile.TarInfo) -> None:
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("../outside", lambda member: None),
        ("site/../../outside", lambda member: None),
        ("/outside", lambda member: None),
        ("site/link", as_link),
        ("site/device", lambda member: setattr(member, "type", tarfile.CHRTYPE)),
    ],
)
def test_an_archive_cannot_write_outside_its_folder(
    root: Path, release: Release, name: str, edit: Callable[[tarfile.TarInfo], object]
) -> None:
    data = packed({name: b"x"}, edit)
    sha256 = hashlib.sha256(gzip.decompress(data)).hexdigest()
    manifest = changed(release, sha256=sha256, packed_bytes=len(data), bytes=len(gzip.decompress(data)))
    with pytest.raises(unpack.Damaged, match="no plain file below its folder"):
        unpack.receive(str(root), order(manifest, sha256, data))
    assert stored(root, "layers") == set()
    assert sorted(os.listdir(root)) == ["layers"]


def test_an_archive_larger_than_it_says_is_cut_off(root: Path, release: Release) -> None:
    data = packed({"site/bomb": bytes(50_000_000)})
    manifest = changed(release, packed_bytes=len(data), bytes=100_000)
    with pytest.raises(unpack.Damaged):
        unpack.receive(str(root), order(manifest, manifest["layers"][0]["sha256"], data))
    assert stored(root, "layers") == set()


def test_a_release_that_does_not_work_here_is_not_put_in_place(root: Path, release: Release) -> None:
    with pytest.raises(unpack.Damaged, match=f"{release.id} does not work on this host: .*No module named 'nosuch'"):
        unpack.receive(str(root), sent(release, manifest={"check": "import nosuch"}))
    files = {**release.manifest["files"], "bin/rbee-python": "#!/nosuch/sh\n"}
    with pytest.raises(unpack.Damaged, match=r"does not start on this host: .*bin/rbee-python"):
        unpack.receive(str(root), sent(release, lacking=[], manifest={"files": files}))
    assert stored(root, "releases") == set()
    assert unpack.receive(str(root), sent(release, lacking=[])) == release.id


def test_modules_are_compiled_here_when_the_sender_has_another_python(root: Path, release: Release) -> None:
    data = packed({"site/alone.py": b"VALUE = 1\n"})
    sha256 = hashlib.sha256(gzip.decompress(data)).hexdigest()
    layer = {"name": "alone", "sha256": sha256, "packed_bytes": len(data), "bytes": len(gzip.decompress(data))}
    links = {"site": f"../../layers/{sha256}/site"}
    check = "import alone; open(alone.__cached__).close()"
    manifest = {**release.manifest, "pyc": "00000000", "layers": [layer], "links": links, "check": check}
    unpack.receive(str(root), order(manifest, sha256, data))
    compiled = root / "layers" / sha256 / importlib.util.cache_from_source("site/alone.py")
    assert compiled.read_bytes()[4] == 1, "checked by no time stamp"


def test_collecting_spares_what_is_current_kept_or_running(root: Path, release: Release) -> None:
    unpack.receive(str(root), sent(release))
    for name in ("00000000000000aa", "00000000000000bb", "00000000000000cc"):
        unpack.receive(str(root), sent(release, lacking=[], manifest={"id": name}))
    lonely = root / "layers" / ("d" * 64)
    lonely.mkdir()
    (root / "layers/.interrupted.tmp").mkdir()
    (root / "current").symlink_to(f"releases/{release.id}")
    command = [str(root / "releases/00000000000000aa/bin/rbee-python"), "-c", "print('up', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        gone = unpack.collect(str(root), ["00000000000000bb"])
        assert gone == ["releases/00000000000000cc", f"layers/{'d' * 64}"]
        process.communicate("\n", timeout=GUARD_S)
    assert unpack.collect(str(root), []) == ["releases/00000000000000aa", "releases/00000000000000bb"]
    assert stored(root, "layers") == {layer.sha256 for layer in release.layers}


def test_the_program_alone_is_enough_on_a_host(root: Path, release: Release) -> None:
    """It is sent as text: no import of rbee may creep into it."""

    def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-I", "-S", "-c", Path(unpack.__file__).read_text(), *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, timeout=GUARD_S, check=False)

    asked = run("lacking", str(root), stdin=json.dumps(release.manifest).encode())
    assert json.loads(asked.stdout) == [layer.sha256 for layer in release.layers]
    assert json.loads(run("receive", str(root), stdin=sent(release).getvalue()).stdout) == release.id
    refused = run(
        "receive", str(root), stdin=sent(release, lacking=[], manifest={"id": "0" * 16, "check": "1/0"}).read()
    )
    assert (refused.returncode, b"ZeroDivisionError" in refused.stderr) == (1, True)
    impossible = run("receive", "/dev/null/rbee", stdin=sent(release).getvalue())
    assert (impossible.returncode, b"/dev/null/rbee" in impossible.stderr) == (1, True)
    assert b"Traceback" not in refused.stderr + impossible.stderr
