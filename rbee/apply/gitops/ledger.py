"""What the reconciler knows, and writes down: of commits, of hosts, and for others to see."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec

from rbee.apply.gitops.child import Report
from rbee.apply.gitops.git import Repository
from rbee.apply.gitops.records import HostRecord, Records, State
from rbee.apply.gitops.schedule import (
    COMMIT_FIRST_S,
    COMMIT_LONGEST_S,
    FAILED_HOST_FIRST_S,
    HOST_FIRST_S,
    HOST_LONGEST_S,
    Dice,
    back_off_s,
    status_of,
)
from rbee.wire.gitops import GitopsStatus

log = logging.getLogger("rbee.gitops")


class Ledger:
    """The state in memory and on disk, with the clock and the dice that its waits come from."""

    def __init__(self, records: Records, repository: Repository, clock: Callable[[], float], dice: Dice) -> None:
        self.records, self._repository = records, repository
        self.clock, self.dice = clock, dice
        self.state = State()
        self.acting = False
        self._told = (b"", b"")

    def tell(self) -> GitopsStatus:
        """Write down what changed, and return what others see."""
        suspension = self.records.suspension()
        reason = suspension.reason if suspension is not None else None
        status = status_of(self.state, acting=self.acting, suspended=reason)
        told = (msgspec.json.encode(self.state), msgspec.json.encode(status))
        if told != self._told:
            self.records.save(*told)
            self._told = told
        return status

    def audit(
        self,
        action: str,
        revision: str,
        result: str,
        *,
        began: float | None = None,
        report: Report | None = None,
        error: str = "",
    ) -> None:
        """Add to the history what was done for a commit."""
        commit = self._repository.commit(revision)
        entry: dict[str, Any] = {
            "action": action,
            "revision": revision,
            "author": commit.author,
            "signer": commit.signer,
            "subject": commit.subject,
            "result": result,
            "seconds": round(self.clock() - (began if began is not None else self.clock()), 3),
            "hosts": {name: told.state for name, told in report.hosts.items()} if report else {},
            "error": error,
        }
        self.records.audit(entry)

    def fail(self, revision: str, why: str, began: float, report: Report) -> None:
        """Give a commit up, until its time comes."""
        state = self.state
        state.attempts = state.attempts + 1 if state.failed == revision else 1
        state.failed, state.failure = revision, why
        state.retry_at = self.clock() + back_off_s(state.attempts, COMMIT_FIRST_S, COMMIT_LONGEST_S, self.dice)
        self.audit("roll-out", revision, "failed", began=began, report=report, error=why)
        log.error("%s failed: %s", revision[:12], why)

    def note_hosts(self, revision: str, report: Report, *, failing: bool = False) -> None:
        """Keep what a child told of each host; `failing` when its commit is about to be taken back."""
        for name, result in report.hosts.items():
            host = self.host(name)
            if result.state == "converged":
                host.revision, host.state, host.error, host.attempts, host.retry_at = revision, "converged", "", 0, 0.0
            elif result.state != "skipped":
                host.revision = revision if failing and result.state == "failed" else host.revision
                self.postpone(host, result.state, result.problem)

    def postpone(self, host: HostRecord, state: str, why: str) -> None:
        """Note why a host is not as it should be, and when it is tried again."""
        host.state, host.error = state, why
        host.attempts += 1
        first = FAILED_HOST_FIRST_S if state == "failed" else HOST_FIRST_S
        host.retry_at = self.clock() + back_off_s(host.attempts, first, HOST_LONGEST_S, self.dice)

    def host(self, name: str) -> HostRecord:
        """Return what is known of a host; a new one is waited for."""
        return self.state.hosts.setdefault(name, HostRecord())

    def leave_out(self, report: Report) -> None:
        """Forget hosts that the inventory does not name any more; what runs there goes on."""
        for name in [name for name in self.state.hosts if name not in report.hosts]:
            log.warning("%s is not in the inventory any more; what runs there goes on", name)
            self.audit("leave", self.state.followed, "left", error=name)
            del self.state.hosts[name]

    def settle(self) -> None:
        """Note that every host has the same commit, where they do."""
        state = self.state
        if all(host.state == "converged" and host.revision == state.good for host in state.hosts.values()):
            state.settled = state.good
