"""What a host is sent: its own roles and engines, packed the same every time, and never what cannot run there."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest

from rbee.apply.release import Release, Target, build, stream
from rbee.apply.release.contents import installed
from rbee.apply.release.cpu import check_cpu, compiled_for
from rbee.apply.release.distributions import closure, roots
from rbee.apply.release.elf import needs
from rbee.apply.release.layers import Cache
from rbee.apply.release.libraries import here, shipped
from rbee.apply.release.overlay import links
from rbee.apply.release.wheels import contents
from rbee.errors import PluginProblem, SetupProblem

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="hosts run Linux")

TARGET = Target(
    python="{}.{}".format(*sys.version_info[:2]), machine=platform.machine(), libc=" ".join(platform.libc_ver())
)
OTHER_PYTHON = Target(python="3.99", machine=TARGET.machine, libc=TARGET.libc)


def names(*roles: str, backends: tuple[str, ...] = ()) -> set[str]:
    return {known.name.lower() for known in closure(roots(roles, backends), TARGET.markers())}


def plain_build(cache: Path, *backends: str) -> Release:
    return build(frozenset(), frozenset(backends), TARGET, folder=cache, online=False)


def test_a_host_gets_its_own_roles_packages_and_its_engines_alone() -> None:
    assert {"tinydb", "msgspec", "rbee"} <= names("hive")
    assert not {"gevent", "pyinfra", "xllamacpp", "pytest"} & names("hive")
    assert {"gevent", "rhai-py", "gunicorn_h1c"} <= names("queen")
    assert not {"tinydb", "xllamacpp"} & names("queen")
    assert names("hive", backends=("echo",)) - names("hive") == {"rbee-echo"}


def test_an_unknown_engine_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(
        PluginProblem, match=r"'nosuch' is not installed on this machine.*echo.*pip install rbee-nosuch"
    ):
        plain_build(tmp_path, "nosuch")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (Target(python="3.10"), r"Python 3\.10, rbee needs 3\.11.*RbeePython"),
        (Target(python="3.12", libc="musl 1.2.5"), "'musl 1.2.5'; the engines' wheels need glibc"),
    ],
)
def test_a_machine_that_cannot_run_rbee_is_refused(target: Target, said: str, tmp_path: Path) -> None:
    with pytest.raises(SetupProblem, match=said):
        build(frozenset(), frozenset(), target, folder=tmp_path)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    one, two = (plain_build(tmp_path / name, "echo") for name in ("one", "two"))
    assert one.id == two.id
    every = [layer.sha256 for layer in one.layers]
    assert b"".join(stream(one, every)) == b"".join(stream(two, every))


def test_an_upgrade_sends_what_changed_alone(tmp_path: Path, editable: Path) -> None:
    before = plain_build(tmp_path / "cache", "tiny")
    (editable / "rbee_tiny/__init__.py").write_text("VALUE = 'a longer one'\n")
    after = plain_build(tmp_path / "cache", "tiny")
    changed = {layer.name for layer in after.layers if layer not in before.layers}
    assert (changed, before.id != after.id) == ({"rbee-tiny"}, True)


@pytest.fixture
def editable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin installed with `pip install -e`, whose pyproject.toml is newer than its installed metadata."""
    checkout, site = tmp_path / "checkout", tmp_path / "site-packages"
    for file, text in {
        "pyproject.toml": '[project]\nname = "rbee-tiny"\nversion = "1"\ndependencies = ["rbee", "tinydb>=4"]\n'
        '[tool.hatch.build.targets.wheel.force-include]\npages = "rbee_tiny/pages"\n',
        "pages/one.txt": "fresh",
        "rbee_tiny/__init__.py": "VALUE = 1\n",
        "rbee_tiny/words.txt": "one two\n",
        "rbee_tiny/__pycache__/old.pyc": "",
        "rbee_tiny/tests/test_it.py": "assert True\n",
        "rbee_tiny/.git/config": "",
        "setup_notes.txt": "",
    }.items():
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        (checkout / file).write_text(text)
    told = {"url": checkout.as_uri(), "dir_info": {"editable": True}}
    distribution(
        site,
        "rbee-tiny",
        requires=["rbee"],
        files={"entry_points.txt": "[rbee.backends]\ntiny = rbee_tiny:Tiny\n", "direct_url.json": json.dumps(told)},
    )
    stale = site / "rbee_tiny/pages/one.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("stale")
    with (site / "rbee_tiny-1.dist-info/RECORD").open("a") as record:
        record.write("rbee_tiny/pages/one.txt,,\n" * 2)  # some installers name a file twice
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.syspath_prepend(str(checkout))
    monkeypatch.delitem(sys.modules, "rbee_tiny", raising=False)
    return checkout


def distribution(
    site: Path, name: str, *, tag: str = "py3-none-any", requires: list[str] = [], files: dict[str, str] = {}
) -> Distribution:
    """Write an installed distribution of version 1."""
    folder = site / f"{name.replace('-', '_')}-1.dist-info"
    folder.mkdir(parents=True)
    needed = "".join(f"Requires-Dist: {one}\n" for one in requires)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{needed}\nA page of words.\n"
    written = {"METADATA": metadata, "WHEEL": f"Wheel-Version: 1.0\nTag: {tag}\n", **files}
    for file, text in written.items():
        (folder / file).write_text(text)
    (folder / "RECORD").write_text("".join(f"{folder.name}/{file},,\n" for file in [*written, "RECORD"]))
    return PathDistribution(folder)


def test_an_editable_install_is_followed_to_its_checkout(editable: Path, tmp_path: Path) -> None:
    known = Distribution.from_name("rbee-tiny")
    items = {item.name: item for item in installed(known)}
    assert set(items) == {
        "site/rbee_tiny/__init__.py",
        "site/rbee_tiny/words.txt",
        "site/rbee_tiny/pages/one.txt",
        *(f"site/rbee_tiny-1.dist-info/{file}" for file in ("METADATA", "WHEEL", "entry_points.txt", "RECORD")),
    }
    assert items["site/rbee_tiny/pages/one.txt"].read() == b"fresh"
    assert str(editable).encode() not in b"".join(item.read() for item in items.values())
    assert "tinydb" in {one.name for one in closure(roots((), ("tiny",)), TARGET.markers())}
    metadata = items["site/rbee_tiny-1.dist-info/METADATA"].read()
    assert (b"Requires-Dist: tinydb>=4\n" in metadata, metadata.endswith(b"\n\nA page of words.\n")) == (True, True)


def test_a_missing_requirement_says_who_needs_it_and_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"entry_points.txt": "[rbee.backends]\nlost = rbee_lost:Lost\n"}
    distribution(tmp_path, "rbee-lost", requires=["nosuch-engine>=2"], files=files)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        SetupProblem, match=r"lacks nosuch-engine, which rbee-lost needs.*pip install 'nosuch-engine>=2'"
    ):
        plain_build(tmp_path / "cache", "lost")


def test_a_package_that_lost_a_file_is_not_sent(tmp_path: Path) -> None:
    known = distribution(tmp_path, "broken")
    (tmp_path / "broken-1.dist-info/WHEEL").unlink()
    with pytest.raises(SetupProblem, match=r"broken 1 .* lacks site/broken-1.dist-info/WHEEL.*--force-reinstall"):
        installed(known)


def wheel(folder: Path, tag: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"compiled-1-{tag}.whl", "w") as archive:
        archive.writestr("compiled/__init__.py", text)
        archive.writestr("compiled-1.data/platlib/compiled/more.py", "")
        archive.writestr("compiled-1.data/scripts/compiled", "")
        archive.writestr("compiled-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: compiled\nVersion: 1\n")


def test_another_python_gets_a_stored_wheel_of_the_same_version(tmp_path: Path) -> None:
    known = distribution(tmp_path / "site", "compiled", tag=f"cp311-cp311-manylinux_2_17_{TARGET.machine}")
    wheels = tmp_path / "cache/wheels"
    wheel(wheels, f"cp398-cp398-manylinux_2_17_{TARGET.machine}", "too old")
    wheel(wheels, f"cp399-cp399-manylinux_2_17_{TARGET.machine}", "fits best")
    wheel(wheels, "py3-none-any", "fits")
    wheel(wheels, "cp399-cp399-manylinux_2_17_sparc", "another machine")
    found = {item.name: item.read() for item in contents(known, OTHER_PYTHON, tmp_path / "cache", online=False)}
    assert found["site/compiled/__init__.py"] == b"fits best"
    assert {"site/compiled/more.py", "site/compiled-1.dist-info/METADATA"} <= set(found)
    assert not [name for name in found if "scripts" in name]


def test_without_a_fitting_wheel_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    known = distribution(tmp_path / "site", "compiled", tag=f"cp311-cp311-linux_{TARGET.machine}")
    with pytest.raises(SetupProblem, match=r"compiled 1 .* does not fit Python 3\.99 on .*pip wheel .*compiled==1"):
        contents(known, OTHER_PYTHON, tmp_path, online=False)


def test_a_host_of_another_machine_gets_no_compiled_file_of_this_one(tmp_path: Path) -> None:
    with pytest.raises(SetupProblem, match=r"does not fit Python \S+ on riscv64"):
        build(frozenset(), frozenset(), Target(python=TARGET.python, machine="riscv64"), folder=tmp_path, online=False)


def test_libraries_that_a_minimal_host_lacks_are_found_with_what_they_need() -> None:
    if here("libgomp.so.1") is None:
        pytest.skip("this machine has no libgomp")
    found = shipped(["libgomp.so.1", "libc.so.6", "libcublas.so.12", "libinside.so.2"], present=["libinside.so.2"])
    assert list(found) == ["libgomp.so.1"]
    read = needs(found["libgomp.so.1"][0].read())
    assert (read.machine, "libc.so.6" in read.libraries) == (platform.machine(), True)
    assert (2, 2) <= read.glibc <= tuple(map(int, platform.libc_ver()[1].split(".")[:2]))
    assert ctypes.CDLL(str(found["libgomp.so.1"][0].path))


@pytest.mark.parametrize(
    "data", [b"", b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + bytes(40), b"\x7fELF\x02\x01" + b"\xff" * 90]
)
def test_a_damaged_library_needs_nothing_and_breaks_nothing(data: bytes) -> None:
    assert needs(data).libraries == ()


def test_an_engine_compiled_for_this_cpu_is_not_sent_to_a_lesser_one() -> None:
    try:
        known = Distribution.from_name("llama-cpp-python")
    except ImportError:
        pytest.skip("needs llama-cpp-python")
    flags = compiled_for(known)
    if not flags:
        pytest.skip("llama-cpp-python here is a portable build")
    check_cpu([known], Target(python="3.11", machine=platform.machine(), cpu_flags=frozenset(flags | {"more"})))
    lost = sorted(flags)[0]
    with pytest.raises(SetupProblem, match=rf"host's CPU lacks {lost}\. Try: CMAKE_ARGS=-DGGML_NATIVE=OFF pip"):
        check_cpu([known], Target(python="3.11", machine=platform.machine(), cpu_flags=frozenset(flags - {lost})))


def test_layers_that_share_a_folder_are_merged_there_and_nowhere_else() -> None:
    layers = {
        "aa": ["site/zope/event/__init__.py", "site/one.py"],
        "bb": ["site/zope/interface/__init__.py", "site/zope/interface/more.py", "site/one.py"],
        "cc": ["lib/libgomp.so.1"],
    }
    assert links(layers) == {
        "lib": "../../layers/cc/lib",
        "site/one.py": "../../../layers/aa/site/one.py",
        "site/zope/event": "../../../../layers/aa/site/zope/event",
        "site/zope/interface": "../../../../layers/bb/site/zope/interface",
    }


def test_the_cache_forgets_old_layers_and_repacks_damaged_ones(tmp_path: Path, editable: Path) -> None:
    now = [1_000_000_000.0]
    cache = Cache(tmp_path / "cache", clock=lambda: now[0])
    items = installed(Distribution.from_name("rbee-tiny"))
    first = cache.layer("tiny", items)
    assert cache.layer("tiny", items) == first
    first.path.write_bytes(b"")
    assert cache.layer("tiny", items) == first
    with tarfile.open(first.path) as archive:
        assert "site/rbee_tiny/words.txt" in archive.getnames()
    now[0] += 40 * 86400
    (editable / "rbee_tiny/words.txt").write_text("three\n")
    second = cache.layer("tiny", installed(Distribution.from_name("rbee-tiny")))
    cache.prune()
    assert (os.path.exists(first.path), os.path.exists(second.path)) == (False, True)
