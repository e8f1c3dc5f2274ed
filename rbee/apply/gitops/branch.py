"""The branch: fetch it, let its commits in or refuse them, and put their files into the work tree."""

from __future__ import annotations

import logging
from pathlib import Path

from rbee.apply.gitops.git import Repository
from rbee.apply.gitops.ledger import Ledger
from rbee.apply.gitops.options import Options
from rbee.errors import Lost, RevisionRefused

log = logging.getLogger("rbee.gitops")


class Branch:
    """What is followed. `ledger.state.followed` is its newest commit that was let in."""

    def __init__(self, options: Options, repository: Repository, ledger: Ledger) -> None:
        self._options, self._repository, self._ledger = options, repository, ledger

    @property
    def inventory(self) -> Path:
        """The inventory's folder in the work tree."""
        return self._repository.folder / self._options.path

    def open(self) -> None:
        """Make the clone usable, whatever a crash left of it."""
        self._repository.keyring.mkdir(mode=0o700, exist_ok=True)
        self._repository.open()

    def look(self) -> None:
        """Fetch, and judge what is new."""
        state = self._ledger.state
        try:
            tip = self._repository.fetch()
            state.fetch_error, state.fetch_failures = "", 0
            self._judge(tip)
        except (Lost, RevisionRefused) as problem:
            state.fetch_error, state.fetch_failures = str(problem), state.fetch_failures + 1
            log.warning("%s", problem)
        state.checked_at = self._ledger.clock()

    def accept(self, revision: str) -> None:
        """Follow the branch from a commit on that does not build on what was followed."""
        state = self._ledger.state
        try:
            tip = self._repository.fetch()
            if not self._repository.contains(revision, tip):
                raise RevisionRefused(f"{self._options.branch} does not contain {revision[:12]}")
            if self._options.require_signed:
                self._repository.check_signatures("", revision)
        except (Lost, RevisionRefused) as problem:
            log.error("%s was not accepted: %s", revision[:12], problem)
            self._ledger.audit("accept", revision, "refused", error=str(problem))
            return
        self._ledger.audit("accept", revision, "accepted")
        state.followed, state.signed, state.refusal = revision, self._options.require_signed, ""
        if revision == state.good:
            state.failed = state.failure = ""
        state.retry_at = self._fetch_at = 0.0

    def check_out(self, revision: str) -> Path:
        """Put a commit's inventory into the work tree, and return its folder. Raises: RevisionRefused."""
        self._repository.check_out(revision)
        if self._repository.tracks(revision, f"{self._options.path}/.rbee"):
            raise RevisionRefused(
                f"commit {revision[:12]} holds {self._options.path}/.rbee, the fleet's secrets",
                hint="git rm -r --cached it, and make new ones: whoever can read the repository has these",
            )
        if not self.inventory.is_dir():
            raise RevisionRefused(f"commit {revision[:12]} has no folder {self._options.path}", hint="--path")
        return self.inventory

    def _judge(self, tip: str) -> None:
        """Let the branch's newest commit in, or say why not."""
        state = self._ledger.state
        try:
            if state.followed and not self._repository.contains(state.followed, tip):
                raise RevisionRefused(
                    f"{tip[:12]} does not build on {state.followed[:12]}: the branch was rewritten",
                    hint=f"rbee gitops accept {tip[:12]}",
                )
            if self._options.require_signed:
                known = state.followed if state.signed else ""
                if tip != known:
                    self._repository.check_signatures(known, tip)
        except RevisionRefused as problem:
            if state.refusal != str(problem):
                log.error("%s", problem)
                self._ledger.audit("refuse", tip, "refused", error=str(problem))
            state.refusal = str(problem)
            return
        state.refusal = ""
        state.signed = self._options.require_signed
        if tip != state.followed:
            log.info("new commit %s", tip[:12])
            state.followed = tip
            state.retry_at = 0.0
            state.attempts = 0
