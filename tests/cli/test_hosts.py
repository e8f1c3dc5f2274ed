"""`rbee hosts` against a real sshd."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_rig import Person, wait_until

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")

pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None or (os.getuid() == 0 and not Path("/run/sshd").is_dir()),
    reason="there is no sshd to ask for its key",
)


@dataclass
class Machine:
    """An sshd of our own on a free port, which lets in whoever has the key `login`."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    def key(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
        return path

    def fingerprint(self, name: str) -> str:
        words = ["ssh-keygen", "-lf", str(self.key(name))]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[1]

    def start(self, host_key: str) -> None:
        """Start it, in place of one that runs, with this host key."""
        self.stop()
        allowed = self.key("login").with_suffix(".pub")
        config = self.folder / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.key(host_key)}\nPidFile none\n"
            f"StrictModes no\nAuthorizedKeysFile {allowed}\nPermitRootLogin yes\n"
        )
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(config)], stderr=log)
        wait_until(self._listens, "sshd listens")

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)
            self.process = None

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "machine"
    folder.mkdir()
    found = Machine(folder, port)
    try:
        found.start("first")
        yield found
    finally:
        found.stop()


@pytest.fixture
def author(person: Person, machine: Machine) -> Person:
    """Someone whose fleet has that machine, and one that is reached through it."""
    person.environment["HOME"] = str(person.home)
    (person.folder / "inventory").mkdir()
    (person.folder / "inventory" / "fleet.conf").write_text(
        "IgnoreUnknown Hive*\n"
        f"Host box\n  HostName 127.0.0.1\n  Port {machine.port}\n"
        f"Host far\n  HostName localhost\n  Port {machine.port}\n  ProxyJump box\n"
        f"Host off\n  HostName 127.0.0.1\n  HivePort 7836\n  Port 9\n"
        f"Host *\n  User {getpass.getuser()}\n  IdentityFile {machine.key('login')}\n  IdentitiesOnly yes\n"
    )
    return person


def pinned(author: Person) -> str:
    path = author.folder / "inventory" / "known_hosts"
    return path.read_text() if path.exists() else ""


def test_a_key_is_shown_asked_about_and_pinned_only_then(author: Person, machine: Machine) -> None:
    done = author.rbee("hosts", "trust", "box")
    assert done.returncode == 2
    assert (
        f"box ([127.0.0.1]:{machine.port}) shows this ssh-ed25519 key:\n  {machine.fingerprint('first')}" in done.stderr
    )
    assert pinned(author) == ""
    done = author.rbee("hosts", "trust", "box", "--yes")
    assert done.returncode == 0, done.stderr
    public = machine.key("first").with_suffix(".pub").read_text().split()[:2]
    assert pinned(author) == f"[127.0.0.1]:{machine.port} {' '.join(public)}\n"
    assert (author.folder / "inventory" / "known_hosts").stat().st_mode & 0o777 == 0o644


def test_a_terminal_is_asked(author: Person, machine: Machine) -> None:
    for answer, code in ((b"n\n", 130), (b"y\n", 0)):
        master, slave = os.openpty()
        os.write(master, answer)
        done = subprocess.run(author.command("hosts", "trust", "box"), stdin=slave, stderr=subprocess.PIPE,
                              cwd=author.folder, env=author.env(), timeout=120, check=False)  # fmt: skip
        os.close(slave)
        os.close(master)
        assert done.returncode == code, done.stderr
        assert bool(pinned(author)) == (code == 0)


def test_ssh_takes_the_pinned_machine_and_no_other(author: Person, machine: Machine) -> None:
    author.rbee("hosts", "trust", "box", "--yes")
    config = author.rbee("inventory", "ssh-config").stdout.strip()

    def ssh() -> subprocess.CompletedProcess[str]:
        words = ["ssh", "-F", config, "-o", "BatchMode=yes", "box", "echo here"]
        return subprocess.run(words, cwd=author.folder, env=author.env(), capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=120, check=False)  # fmt: skip

    assert ssh().stdout == "here\n"
    machine.start("second")
    assert "IDENTIFICATION HAS CHANGED" in ssh().stderr


def test_only_the_named_fingerprint_is_pinned(author: Person, machine: Machine) -> None:
    done = author.rbee("hosts", "trust", "box", "--fingerprint", machine.fingerprint("second"))
    assert done.returncode == 1
    assert f"is {machine.fingerprint('first')}, not {machine.fingerprint('second')}" in done.stderr
    assert pinned(author) == ""
    assert author.rbee("hosts", "trust", "box", "--fingerprint", machine.fingerprint("first")).returncode == 0
    assert pinned(author)


def test_a_changed_key_is_refused_until_the_old_one_is_forgotten(author: Person, machine: Machine) -> None:
    author.rbee("hosts", "trust", "box", "--yes")
    before = pinned(author)
    machine.start("second")
    done = author.rbee("hosts", "trust", "box", "--yes")
    assert done.returncode == 1
    assert machine.fingerprint("first") in done.stderr
    assert machine.fingerprint("second") in done.stderr
    assert "try: if you know why: rbee hosts forget box" in done.stderr
    assert pinned(author) == before
    assert author.rbee("hosts", "forget", "box").returncode == 0
    assert pinned(author) == ""
    assert author.rbee("hosts", "trust", "box", "--yes").returncode == 0
    assert machine.key("second").with_suffix(".pub").read_text().split()[1] in pinned(author)


def test_trusting_twice_changes_nothing(author: Person, machine: Machine) -> None:
    author.rbee("hosts", "trust", "box", "--yes")
    before = pinned(author)
    done = author.rbee("hosts", "trust", "box")
    assert (done.returncode, done.stderr) == (0, f"box is trusted already: {machine.fingerprint('first')}\n")
    assert pinned(author) == before


def test_a_pinned_name_may_be_hashed(author: Person, machine: Machine) -> None:
    author.rbee("hosts", "trust", "box", "--yes")
    path = author.folder / "inventory" / "known_hosts"
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(path)], check=True, capture_output=True)
    assert pinned(author).startswith("|1|")
    assert "trusted already" in author.rbee("hosts", "trust", "box").stderr
    assert author.rbee("hosts", "forget", "box").returncode == 0
    assert pinned(author) == ""


def test_a_machine_behind_a_jump_host_comes_after_it(author: Person, machine: Machine) -> None:
    done = author.rbee("hosts", "trust", "far", "--yes")
    assert done.returncode == 3
    assert f"try: rbee hosts trust HOST for the jump host [127.0.0.1]:{machine.port} first" in done.stderr
    assert pinned(author) == ""
    assert author.rbee("hosts", "trust", "box", "far", "--yes").returncode == 0
    assert [line.split()[0] for line in pinned(author).splitlines()] == [
        f"[127.0.0.1]:{machine.port}",
        f"[localhost]:{machine.port}",
    ]


def test_a_machine_that_is_off_is_said_to_be(author: Person) -> None:
    done = author.rbee("hosts", "trust", "off", "--yes")
    assert done.returncode == 3
    assert "ssh gets no key from off: ssh: connect to host 127.0.0.1 port 9" in done.stderr


def test_a_key_that_the_person_knows_is_named_as_such(author: Person, machine: Machine) -> None:
    (author.home / ".ssh").mkdir()
    public = machine.key("first").with_suffix(".pub").read_text()
    (author.home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{machine.port} {public}")
    assert "It is the one in your ~/.ssh/known_hosts." in author.rbee("hosts", "trust", "box").stderr
    assert pinned(author) == ""


def test_list_shows_who_is_trusted(author: Person, machine: Machine) -> None:
    author.rbee("hosts", "trust", "box", "--yes")
    rows = {line.split()[0]: line.split() for line in author.rbee("hosts", "list").stdout.splitlines()}
    assert rows["box"][2:4] == ["yes", machine.fingerprint("first")]
    assert rows["far"][2] == "no"
    found = {entry["host"]: entry["keys"] for entry in json.loads(author.rbee("hosts", "list", "--json").stdout)}
    assert found == {"box": [machine.fingerprint("first")], "far": [], "off": []}


def test_names_that_are_no_machines(author: Person) -> None:
    done = author.rbee("hosts", "trust", "bxo", "--yes")
    assert (done.returncode, done.stderr.splitlines()[1]) == (4, "  try: box")
    assert author.rbee("hosts", "trust", "--yes", "--", "-oProxyCommand=touch ran").returncode == 4
    assert not (author.folder / "ran").exists()
    done = author.rbee("hosts", "forget", "box")
    assert done.returncode == 4
    assert "has no key of box" in done.stderr
