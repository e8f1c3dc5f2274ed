"""The reconciler's own clone. git is asked through its program, never through hooks, and never asks back."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rbee.apply.gitops.programs import Done, Programs
from rbee.errors import RevisionRefused, SetupProblem, Unreachable

FETCH_LIMIT_S, COMMAND_LIMIT_S = 600.0, 120.0
SETTINGS = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "safe.directory": "*",
    "protocol.ext.allow": "never",
    "fetch.recurseSubmodules": "no",
    "submodule.recurse": "false",
    "gc.autoDetach": "false",
    "advice.detachedHead": "false",
}
# A repository of the caller's own must not be taken for this one (git(1), ENVIRONMENT VARIABLES).
FOREIGN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_NAMESPACE")
NOT_SIGNED = {
    "N": "has no signature",
    "B": "has a signature that does not fit it",
    "E": "is signed by a key that nobody here knows",
    "U": "is signed by a key that nobody here knows",
    "X": "has a signature that has expired",
    "Y": "is signed by a key that has expired",
    "R": "is signed by a key that was revoked",
}


class Commit(NamedTuple):
    """Who made a commit, and who vouches for it."""

    revision: str
    author: str
    subject: str
    signature: str
    """git's letter for it: G good, N none, … (git-log(1), %G?)."""
    signer: str
    key: str


@dataclass
class Repository:
    """A clone of one branch in `folder`. `signers` is an SSH allowed_signers file, `keyring` a GnuPG home."""

    folder: Path
    url: str
    branch: str
    programs: Programs
    signers: Path
    keyring: Path
    ssh_key: Path | None = None
    known_hosts: Path | None = None
    _environment: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Fix what git sees of the world."""
        ssh = ["ssh", "-oBatchMode=yes", "-oConnectTimeout=10", "-oServerAliveInterval=15", "-oServerAliveCountMax=4"]
        if self.ssh_key:
            ssh += ["-i", str(self.ssh_key)]
        if self.known_hosts:
            ssh += ["-oStrictHostKeyChecking=yes", f"-oUserKnownHostsFile={self.known_hosts} ~/.ssh/known_hosts"]
        self._environment = {
            **{name: value for name, value in os.environ.items() if name not in FOREIGN},
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ASKPASS": "",
            "SSH_ASKPASS": "",
            "SSH_ASKPASS_REQUIRE": "never",
            "GIT_SSH_COMMAND": shlex.join(ssh),
            "GNUPGHOME": str(self.keyring),
            "LC_ALL": "C.UTF-8",
        }

    @property
    def ref(self) -> str:
        """Where the clone keeps what the branch was at the last fetch."""
        return f"refs/remotes/origin/{self.branch}"

    def open(self) -> None:
        """Make the clone usable, whatever a crash left of it. The caller is alone with it."""
        if not (self.folder / ".git").is_dir():
            self._start_anew()
        for lock in [*self.folder.glob(".git/*.lock"), *self.folder.glob(".git/refs/**/*.lock")]:
            lock.unlink(missing_ok=True)

    def fetch(self) -> str:
        """Return the branch's newest commit. Raises: Unreachable with git's own words, TimedOut."""
        done = self._fetch()
        if done.code and not self._is_sound():
            self._start_anew()
            done = self._fetch()
        if done.code:
            raise Unreachable(f"{self.url} cannot be fetched: {_last(done.words)}", hint=self._hint(done.words))
        return self.resolve(self.ref)

    def resolve(self, name: str) -> str:
        """Return the whole hash of a commit. Raises: RevisionRefused when there is none of that name."""
        done = self._git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if done.code:
            raise RevisionRefused(f"{self.url} has no commit {name}")
        return done.output.strip()

    def has(self, revision: str) -> bool:
        """Tell whether the clone has a commit."""
        return self._git("cat-file", "-e", f"{revision}^{{commit}}").code == 0

    def contains(self, older: str, newer: str) -> bool:
        """Tell whether `newer` builds on `older`."""
        return self.has(older) and self._git("merge-base", "--is-ancestor", older, newer).code == 0

    def check_signatures(self, older: str, newer: str) -> None:
        """Demand a trusted signature of each commit between two on the first-parent path, or of `newer` alone.

        Merges vouch for what they merge. Raises: RevisionRefused with the first that has none.
        """
        span = [f"{older}..{newer}"] if older else ["--max-count=1", newer]
        listed = self._git("rev-list", "--reverse", "--first-parent", *span, "--")
        if listed.code:
            raise RevisionRefused(f"commit {newer[:12]} cannot be read: {_last(listed.words)}")
        for revision in listed.output.split():
            self._check_signature(revision)

    def _check_signature(self, revision: str) -> None:
        commit = self.commit(revision)
        # GnuPG says U of a key that nobody rated; this keyring holds no others than those a person put there.
        good = commit.signature == "G" or (commit.signature == "U" and not commit.key.startswith("SHA256:"))
        if not good or self._git("verify-commit", revision).code:
            what = NOT_SIGNED.get(commit.signature, "has no trusted signature")
            raise RevisionRefused(
                f"commit {revision[:12]} by {commit.author} {what}",
                hint=f"git commit -S, and the signer in {self.signers}",
            )

    def commit(self, revision: str) -> Commit:
        """Return who made a commit."""
        form = "%x00".join(("%an <%ae>", "%s", "%G?", "%GS", "%GF"))
        fields = self._git("log", "--max-count=1", f"--format={form}", revision, "--").output.strip("\n").split("\0")
        return Commit(revision, *fields) if len(fields) == 5 else Commit(revision, "", "", "", "", "")

    def check_out(self, revision: str) -> Path:
        """Put a commit's files into the work tree, and nothing else. Raises: RevisionRefused."""
        for words in (("checkout", "--force", "--detach", revision), ("clean", "-ffdxq", "-e", ".rbee/")):
            done = self._git(*words, limit_s=FETCH_LIMIT_S)
            if done.code:
                raise RevisionRefused(f"commit {revision[:12]} cannot be checked out: {_last(done.words)}")
        return self.folder

    def tracks(self, revision: str, path: str) -> bool:
        """Tell whether a commit has a file or folder of this path."""
        return bool(self._git("ls-tree", revision, "--", path).output.strip())

    def _fetch(self) -> Done:
        wanted = f"+refs/heads/{self.branch}:{self.ref}"
        return self._git("fetch", "--quiet", "--no-tags", "--", self.url, wanted, limit_s=FETCH_LIMIT_S)

    def _is_sound(self) -> bool:
        return self._git("fsck", "--connectivity-only", "--no-dangling", "--no-progress").code == 0

    def _start_anew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        done = self._git("init", "--quiet", "--template=")
        if done.code:
            raise SetupProblem(f"{self.folder} cannot be made a git repository: {_last(done.words)}")

    def _git(self, *words: str, limit_s: float = COMMAND_LIMIT_S) -> Done:
        settings = {**SETTINGS, "gpg.ssh.allowedSignersFile": str(self.signers)}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return self.programs.run(["git", *options, *words], limit_s=limit_s, env=self._environment, cwd=self.folder)

    def _hint(self, words: str) -> str | None:
        if "couldn't find remote ref" in words:
            return f"does the branch {self.branch} exist?"
        if "Host key verification failed" in words:
            return "the git server's host key in the inventory's known_hosts"
        return None


def _last(words: str) -> str:
    """Return what git complained of; its `fatal:` line says the most."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith(("fatal:", "error:"))]
    return (fatal or lines or ["no reason given"])[0].removeprefix("fatal: ").removeprefix("error: ")
