"""A release in use: this machine's packages, unpacked elsewhere and run by the system's own Python, nothing else."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from rbee.apply import unpack
from rbee.apply.release import Release, Target, build, stream
from rbee.http.upstream import Upstream

ROLES, BACKENDS = frozenset({"hive", "queen"}), frozenset({"echo", "xllamacpp"})
MINOR = "{}.{}".format(*sys.version_info[:2])
GUARD_S = 120

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="hosts run Linux")


def interpreter() -> str:
    """Return an interpreter of this version without this environment's packages: the system's, or the base one."""
    system = f"/usr/bin/python{MINOR}"
    return system if os.access(system, os.X_OK) else str(getattr(sys, "_base_executable", sys.executable))


TARGET = Target(python=MINOR, machine=platform.machine(), libc=" ".join(platform.libc_ver()), interpreter=interpreter())


class Installed:
    """A release on a host: its folder, and how to run it with nothing of this process's environment."""

    def __init__(self, root: Path, release: Release) -> None:
        self.release = release
        self.folder = root / "releases" / release.id
        self.environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "RBEE_HOME": str(root / "home")}

    def python(self, *arguments: str) -> str:
        done = subprocess.run(
            [self.folder / "bin/rbee-python", *arguments],
            env=self.environment, cwd="/", capture_output=True, text=True, timeout=GUARD_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def running(self, *arguments: str, until: str) -> Iterator[re.Match[str]]:
        """Run a program until a line matches, yield the match, and stop it."""
        command = [str(self.folder / "bin/rbee-python"), *arguments]
        process = subprocess.Popen(
            command, env=self.environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout
        seen: list[str] = []
        try:
            for line in process.stdout:
                seen.append(line)
                if found := re.search(until, "".join(seen), re.DOTALL):
                    yield found
                    break
            else:
                pytest.fail("".join(seen))
        finally:
            process.terminate()
            process.communicate(timeout=GUARD_S)


def asked(url: str, method: str, path: str, body: bytes = b"") -> bytes:
    upstream = Upstream(url)
    try:
        answer = upstream.request(method, path, headers={"Content-Type": "application/json"}, body=body)
        assert answer.status == 200
        return answer.read()
    finally:
        upstream.close()


@pytest.fixture(scope="module")
def host() -> Iterator[Installed]:
    # Not pytest's own folder: the check runs as `nobody`, as the services do.
    root = Path(tempfile.mkdtemp(prefix="rbee-release-"))
    root.chmod(0o755)
    try:
        release = build(ROLES, BACKENDS, TARGET, folder=root / "cache", online=False)
        data = b"".join(stream(release, [layer.sha256 for layer in release.layers]))
        assert unpack.receive(str(root / "opt"), io.BytesIO(data)) == release.id
        yield Installed(root / "opt", release)
    finally:
        shutil.rmtree(root)


def test_every_engine_works_in_the_version_of_this_machine(host: Installed) -> None:
    found = {engine["name"]: engine for engine in json.loads(host.python("-m", "rbee.worker", "plugins", "--json"))}
    assert set(found) == BACKENDS
    assert [engine["problem"] for engine in found.values()] == ["", ""]
    assert found["xllamacpp"]["version"] == version("xllamacpp")


def test_a_worker_answers_with_the_built_in_model(host: Installed) -> None:
    run = ("-m", "rbee.worker", "run", "--model", "rbee-demo", "--port", "0")
    with host.running(*run, until=r"listens on \S+:(\d+),.*ready after") as found:
        body = {"model": "rbee-demo", "messages": [{"role": "user", "content": "How do I add a machine?"}]}
        answer = asked(f"http://127.0.0.1:{found[1]}", "POST", "/v1/chat/completions", json.dumps(body).encode())
        assert json.loads(answer)["choices"][0]["message"]["content"].strip()


def test_a_hive_starts_and_reports(host: Installed) -> None:
    with host.running("-m", "rbee.hive", "run", "--port", "0", until=r"listening on (\S+)") as found:
        assert asked(found[1], "GET", "/health")


def test_nothing_but_the_release_and_the_standard_library_is_on_the_path(host: Installed) -> None:
    path = json.loads(host.python("-c", "import json, sys; print(json.dumps(sys.path))"))
    assert path[0] == str(host.folder / "site")
    assert not [entry for entry in path[1:] if "-packages" in entry]


def test_a_program_keeps_its_release_when_another_becomes_current(host: Installed, tmp_path: Path) -> None:
    current = tmp_path / "current"
    current.symlink_to(host.folder)
    program = "print('up', flush=True); input(); import rbee.wire.fleet as it; print(it.__file__)"
    command = [str(current / "bin/rbee-python"), "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        current.unlink()
        current.symlink_to(tmp_path)
        said, _ = process.communicate("\n", timeout=GUARD_S)
    assert said.strip() == str(host.folder / "site/rbee/wire/fleet.py")


def test_modules_come_compiled_since_a_service_may_not_write_them(host: Installed) -> None:
    module = "import rbee.hive.agent as it, os; print(os.path.isfile(it.__cached__), it.run.__code__.co_filename)"
    compiled, file = host.python("-c", module).split()
    assert (compiled, file) == ("True", str(host.folder / "site/rbee/hive/agent.py"))


def test_a_host_can_send_its_release_on_byte_by_byte(host: Installed, tmp_path: Path) -> None:
    """The reconciler applies from a host; were its releases others, two controllers would take turns for ever."""
    program = f"""
import sys
from pathlib import Path
from rbee.apply.release import Target, build
target = Target(python={TARGET.python!r}, machine={TARGET.machine!r}, libc={TARGET.libc!r},
                interpreter={TARGET.interpreter!r})
print(build(frozenset({sorted(ROLES)}), frozenset({sorted(BACKENDS)}), target, folder=Path({str(tmp_path)!r})).id)
"""
    assert host.python("-c", program).strip() == host.release.id
