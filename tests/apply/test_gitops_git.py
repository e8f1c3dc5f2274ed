"""The reconciler's clone: it follows one branch, trusts signatures only, and survives what a crash leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from rbee.apply.gitops.git import Repository
from rbee.apply.gitops.programs import Programs
from rbee.errors import RevisionRefused, ShuttingDown, TimedOut, Unreachable

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


class Person:
    """Somebody who commits."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.work.mkdir()
        config = folder / "gitconfig"
        config.write_text("[user]\nname = Ada\nemail = ada@example.org\n[init]\ndefaultBranch = main\n")
        self.env = {**os.environ, "GIT_CONFIG_GLOBAL": str(config), "GIT_CONFIG_NOSYSTEM": "1"}
        self.git("init", "-q")

    def git(self, *words: str) -> str:
        command = ["git", "-C", str(self.work), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=self.env).stdout.strip()

    def commit(self, text: str = "", *flags: str) -> str:
        (self.work / "file").write_text(text)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "change", *flags)
        return self.git("rev-parse", "HEAD")

    def key(self, name: str) -> Path:
        path = self.folder / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
        return path

    def signed(self, key: Path, *flags: str) -> str:
        self.git("-c", "gpg.format=ssh", "-c", f"user.signingkey={key}", "commit", "-q", "-S", "--allow-empty",
                 "-m", "signed", *flags)  # fmt: skip
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def person(tmp_path: Path) -> Person:
    return Person(tmp_path)


@pytest.fixture
def clone(tmp_path: Path, person: Person) -> Repository:
    (tmp_path / "keyring").mkdir(mode=0o700)
    made = Repository(
        tmp_path / "clone", str(person.work), "main", Programs(threading.Event()),
        signers=tmp_path / "allowed_signers", keyring=tmp_path / "keyring",
    )  # fmt: skip
    made.open()
    return made


def test_it_sees_new_commits_and_which_build_on_which(person: Person, clone: Repository) -> None:
    first = person.commit("1")
    assert clone.fetch() == first
    second = person.commit("2")
    assert clone.fetch() == second
    assert clone.contains(first, second)
    assert not clone.contains(second, first)
    amended = person.commit("3", "--amend")
    assert clone.fetch() == amended
    assert not clone.contains(second, amended)
    assert clone.contains(first, amended)


def test_the_work_tree_is_that_of_the_commit_and_keeps_rbees_own_folder(person: Person, clone: Repository) -> None:
    first, second = person.commit("1"), person.commit("2")
    clone.fetch()
    folder = clone.check_out(second)
    (folder / ".rbee").mkdir()
    (folder / ".rbee/ssh_config").write_text("kept")
    (folder / "stray").write_text("")
    (folder / "file").write_text("edited")
    clone.check_out(first)
    assert (folder / "file").read_text() == "1"
    assert not (folder / "stray").exists()
    assert (folder / ".rbee/ssh_config").read_text() == "kept"


def test_hooks_and_another_repository_in_the_environment_mean_nothing(
    person: Person, clone: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hook = clone.folder / ".git/hooks/post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o755)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    clone.__post_init__()
    revision = person.commit("1")
    assert clone.fetch() == revision
    clone.check_out(revision)
    assert not (tmp_path / "ran").exists()


def test_what_a_crash_leaves_is_mended(person: Person, clone: Repository) -> None:
    revision = person.commit("1")
    clone.fetch()
    (clone.folder / ".git/index.lock").touch()
    clone.open()
    clone.check_out(revision)
    (clone.folder / ".git/HEAD").write_bytes(b"")
    assert clone.fetch() == revision
    clone.check_out(revision)
    assert (clone.folder / "file").read_text() == "1"


def test_a_repository_or_branch_that_is_not_there_is_told(person: Person, clone: Repository) -> None:
    person.commit("1")
    clone.branch = "absent"
    with pytest.raises(Unreachable, match=r"couldn't find remote ref.*does the branch absent exist"):
        clone.fetch()
    clone.url = "/nonexistent/fleet.git"
    with pytest.raises(Unreachable, match=r"/nonexistent/fleet.git"):
        clone.fetch()


def test_a_signature_counts_only_by_a_key_that_is_listed(person: Person, clone: Repository) -> None:
    ours, theirs = person.key("ours"), person.key("theirs")
    clone.signers.write_text(f"ada@example.org {ours.with_suffix('.pub').read_text()}")
    first = person.signed(ours)
    second = person.signed(ours)
    clone.fetch()
    clone.check_signatures("", first)
    clone.check_signatures(first, second)
    assert clone.commit(second).signer == "ada@example.org"
    unlisted = person.signed(theirs)
    clone.fetch()
    with pytest.raises(RevisionRefused, match=r"signed by a key that nobody here knows"):
        clone.check_signatures(second, unlisted)


def test_every_commit_up_to_the_newest_must_be_signed(person: Person, clone: Repository) -> None:
    key = person.key("key")
    clone.signers.write_text(f"ada@example.org {key.with_suffix('.pub').read_text()}")
    first = person.signed(key)
    between = person.commit("unsigned")
    last = person.signed(key)
    clone.fetch()
    with pytest.raises(RevisionRefused, match=rf"{between[:12]} by Ada <ada@example.org> has no signature"):
        clone.check_signatures(first, last)


def test_a_signed_merge_vouches_for_what_it_merges(person: Person, clone: Repository) -> None:
    key = person.key("key")
    clone.signers.write_text(f"ada@example.org {key.with_suffix('.pub').read_text()}")
    first = person.signed(key)
    person.git("switch", "-q", "-c", "proposal")
    person.commit("unsigned")
    person.git("switch", "-q", "main")
    person.git("-c", "gpg.format=ssh", "-c", f"user.signingkey={key}", "merge", "-q", "--no-ff", "-S", "-m", "m",
               "proposal")  # fmt: skip
    clone.fetch()
    clone.check_signatures(first, person.git("rev-parse", "HEAD"))


def test_a_commit_cannot_hide_behind_characters_that_end_a_line(person: Person, clone: Repository) -> None:
    key = person.key("key")
    clone.signers.write_text(f"ada@example.org {key.with_suffix('.pub').read_text()}")
    first = person.signed(key)
    person.commit("unsigned", "--author=A\u2028B\x0cC <a@example.org>")
    last = person.signed(key)
    clone.fetch()
    with pytest.raises(RevisionRefused, match="has no signature"):
        clone.check_signatures(first, last)


@pytest.mark.skipif(not shutil.which("gpg"), reason="gpg is not installed")
def test_an_openpgp_signature_counts_when_its_key_is_in_the_keyring(person: Person, clone: Repository) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as home:  # an agent's socket needs a short path
        person.env["GNUPGHOME"] = home
        gpg = ["gpg", "--homedir", home, "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
        try:
            subprocess.run([*gpg, "--quick-gen-key", "ada@example.org", "ed25519", "sign"], check=True)
            exported = subprocess.run([*gpg, "--export"], check=True, capture_output=True).stdout
            person.git("commit", "-q", "-Sada@example.org", "--allow-empty", "-m", "signed")
        finally:
            subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=True)
    revision = person.git("rev-parse", "HEAD")
    clone.fetch()
    with pytest.raises(RevisionRefused, match="a key that nobody here knows"):
        clone.check_signatures("", revision)
    receive = ["gpg", "--homedir", str(clone.keyring), "--batch", "--quiet", "--no-autostart", "--import"]
    subprocess.run(receive, input=exported, check=True)
    clone.check_signatures("", revision)


def test_without_a_list_of_signers_nothing_is_trusted(person: Person, clone: Repository) -> None:
    revision = person.signed(person.key("key"))
    clone.fetch()
    with pytest.raises(RevisionRefused, match="allowed_signers"):
        clone.check_signatures("", revision)


def test_a_program_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    programs = Programs(threading.Event())
    command = ["sh", "-c", f"sleep 1000 & echo $! > {tmp_path}/pid; wait"]
    with pytest.raises(TimedOut):
        programs.run(command, limit_s=1, env=os.environ)
    # Nobody but init may reap it here, so a process that has ended may still be listed, as a zombie.
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    deadline = time.monotonic() + 60
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "what it started still runs"


def test_stopping_ends_a_program_that_runs(tmp_path: Path) -> None:
    stopping = threading.Event()
    threading.Timer(0.2, stopping.set).start()
    with pytest.raises(ShuttingDown):
        Programs(stopping).run(["sleep", "1000"], limit_s=1000, env=os.environ)
