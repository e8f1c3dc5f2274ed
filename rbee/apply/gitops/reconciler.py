"""The reconciler: look at the branch, judge what is new, do what is due, tell, and wait."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable

from rbee.apply.gitops.branch import Branch
from rbee.apply.gitops.child import Rbee, Report
from rbee.apply.gitops.contact import Contact
from rbee.apply.gitops.git import Repository
from rbee.apply.gitops.ledger import Ledger
from rbee.apply.gitops.options import Options
from rbee.apply.gitops.programs import Programs
from rbee.apply.gitops.records import HostRecord, Records, State
from rbee.apply.gitops.schedule import (
    FAILED_HOST_FIRST_S,
    HOST_FIRST_S,
    HOST_LONGEST_S,
    CatchUp,
    LookForDrift,
    Restore,
    RollOut,
    back_off_s,
    is_due,
    next_action,
)
from rbee.apply.identity import AUTHORITY
from rbee.errors import Lost, RevisionRefused, SetupProblem, ShuttingDown
from rbee.wire.gitops import GitopsState

POLL_S = 0.5
LONGEST_FETCH_S = 300.0
LONGEST_WAIT_S = 7 * 86400.0
JITTER = 0.1
log = logging.getLogger("rbee.gitops")


class Reconciler:
    """Keeps a fleet as a branch says. One thread; whatever kills it, the next one goes on from the files."""

    def __init__(
        self,
        options: Options,
        *,
        rbee: Rbee | None = None,
        contact: Contact | None = None,
        clock: Callable[[], float] = time.time,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self.options = options
        self.stopping = threading.Event()
        self.records = Records(options.folder)
        self._clock, self._dice = clock, dice
        programs = Programs(self.stopping)
        repository = Repository(
            options.folder / "checkout",
            options.repository,
            options.branch,
            programs,
            signers=options.signers or options.folder / "allowed_signers",
            keyring=options.folder / "gnupg",
            ssh_key=options.ssh_key,
            known_hosts=options.known_hosts,
        )
        self._ledger = Ledger(self.records, repository, clock, dice)
        self._branch = Branch(options, repository, self._ledger)
        self._rbee = rbee or Rbee(programs, options.folder, options.identity, options.ssh_key)
        self._contact = contact or Contact()
        self._fetch_at = 0.0

    @property
    def _state(self) -> State:
        return self._ledger.state

    def run(self, *, once: bool = False, ready: Callable[[], None] = lambda: None) -> GitopsState:
        """Go on until `stopping` is set, or, with `once`, until nothing is due. Raises: Busy, SetupProblem."""
        if not (self.options.identity / AUTHORITY).is_file():
            raise SetupProblem(
                f"The fleet's identity is not in {self.options.identity}",
                hint="--identity INVENTORY/.rbee, of the folder that `rbee apply` was run on first",
            )
        with self.records.held():
            self.begin()
            ready()
            try:
                while not self.stopping.is_set():
                    self.step()
                    if once and self.is_idle():
                        break
                    self.stopping.wait(0.0 if once else POLL_S)
            except ShuttingDown:
                log.info("stopped; the next start goes on from here")
            return self._ledger.tell().state

    def step(self) -> None:
        """Do what is due, one thing at most."""
        self._take_requests()
        if is_due(self._fetch_at, self._clock(), LONGEST_WAIT_S):
            self._look()
        self._ledger.tell()
        if self.records.suspension() is not None:
            return
        for name in self._contact.newly_reached(self._away(), self._branch.inventory, self._clock()):
            log.info("%s can be reached again", name)
            self._state.hosts[name].retry_at = self._state.retry_at = 0.0
        match next_action(self._state, self._clock(), self.options.drift_interval_s):
            case RollOut(revision):
                self._guarded(lambda: self._roll_out(revision))
            case Restore():
                self._guarded(self._restore)
            case CatchUp(hosts):
                self._guarded(lambda: self._catch_up("catch-up", hosts))
            case LookForDrift():
                self._guarded(self._look_for_drift)

    # --- what the branch says

    def begin(self) -> None:
        """Take up where the last reconciler of this folder was. Raises: SetupProblem."""
        state = self.records.load()
        if state.source not in ("", self.options.source):
            # Another branch or folder: its history is judged anew, and its commits are no return for the others'.
            state = State(hosts=state.hosts)
        state.source = self.options.source
        state.looked_at = 0.0  # who knows what was changed while nobody looked
        self._ledger.state = state
        self._branch.open()
        self._ledger.tell()

    def _take_requests(self) -> None:
        accepted = self.records.takes_accept()
        if accepted:
            self._branch.accept(accepted)
            self._fetch_at = 0.0
        if self.records.takes_sync():
            log.info("asked to look at once")
            self._fetch_at = self._state.retry_at = self._state.looked_at = 0.0
            for host in self._state.hosts.values():
                host.retry_at = 0.0

    def _look(self) -> None:
        self._branch.look()
        wait = min(self.options.interval_s * 2 ** min(self._state.fetch_failures, 6), LONGEST_FETCH_S)
        wait = max(wait, self.options.interval_s) * (1 + JITTER * (2 * self._dice() - 1))
        self._fetch_at = self._clock() + wait

    # --- what is done

    def _guarded(self, act: Callable[[], None]) -> None:
        """Do one thing, and tell before and after; what goes wrong here is tried again later."""
        self._ledger.acting = True
        self._ledger.tell()
        try:
            act()
        except (Lost, RevisionRefused, SetupProblem) as problem:
            self._give_up(str(problem))
        finally:
            self._ledger.acting = False
            self._ledger.tell()

    def _roll_out(self, revision: str) -> None:
        """Bring the fleet to a new commit; one that fails leaves it, or is taken back, as it was."""
        began = self._clock()
        inventory = self._branch.check_out(revision)
        report = self._rbee.plan(inventory)
        # A host that failed before this commit does not speak against it.
        before = {name for name, host in self._state.hosts.items() if host.state == "failed"}
        guilty = [name for name in report.named("failed") if name not in before]
        if report.error or guilty:
            # Nothing was touched. The work tree goes back too: it tells where hosts are.
            if self._state.good:
                self._branch.check_out(self._state.good)
            self._ledger.fail(revision, report.error or report.reasons("failed"), began, report)
            return
        if report.named("changed"):
            log.info("%s: %d hosts differ", revision[:12], len(report.named("changed")))
            report = self._rbee.apply(inventory)
            # Where one stopped the others, the fleet would be on two commits.
            guilty = [name for name in report.named("failed", "skipped") if name not in before]
        if report.error or guilty:
            # Also after a child that ended early: nobody knows how far it came.
            self._state.restoring = bool(self._state.good)
            self._ledger.note_hosts(revision, report, failing=True)
            self._ledger.fail(revision, report.error or report.reasons("failed"), began, report)
            return
        if report.hosts and not report.named("converged"):
            self._met_nobody(revision, report)
            return
        self._succeed(revision, report, began)

    def _succeed(self, revision: str, report: Report, began: float) -> None:
        state = self._state
        self._ledger.leave_out(report)
        self._ledger.note_hosts(revision, report)
        state.good, state.applied_at, state.looked_at = revision, self._clock(), self._clock()
        state.failed, state.failure, state.attempts, state.retry_at = "", "", 0, 0.0
        self._ledger.settle()
        self._ledger.audit("roll-out", revision, "converged", began=began, report=report)
        log.info("%s: %s", revision[:12], _counts(report))

    def _met_nobody(self, revision: str, report: Report) -> None:
        """No host could be reached, so nothing is known of the commit; it waits as its hosts do."""
        state = self._state
        self._ledger.note_hosts(revision, report)
        state.attempts += 1
        state.retry_at = self._clock() + back_off_s(state.attempts, HOST_FIRST_S, HOST_LONGEST_S, self._dice)
        log.warning("%s: no host could be reached", revision[:12])

    def _restore(self) -> None:
        """Bring the fleet back to the commit before one that failed."""
        state, began = self._state, self._clock()
        report = self._rbee.apply(self._branch.check_out(state.good))
        state.restoring = False
        self._ledger.note_hosts(state.good, report)
        taken = ", ".join(report.named("converged")) or "no host"
        state.failure += f"\n{state.good[:12]} was applied again: {taken}"
        if report.error:
            state.failure += f"\n{report.error}"
            for host in state.hosts.values():
                host.state, host.error, host.retry_at = "failed", report.error, self._clock() + FAILED_HOST_FIRST_S
        self._ledger.settle()
        self._ledger.audit("restore", state.good, "failed" if report.error else "converged", began=began, report=report)
        log.info("restored %s: %s", state.good[:12], report.error or _counts(report))

    def _catch_up(self, action: str, hosts: Iterable[str]) -> None:
        """Bring hosts to the commit that the others have."""
        state, began = self._state, self._clock()
        names = list(hosts)
        report = self._rbee.apply(self._branch.check_out(state.good), names)
        if report.error:
            for name in names:
                self._ledger.postpone(state.hosts[name], "failed", report.error)
        self._ledger.note_hosts(state.good, report)
        self._ledger.settle()
        result = "failed" if report.error or report.named("failed") else "converged"
        if report.named("converged", "failed"):
            self._ledger.audit(action, state.good, result, began=began, report=report, error=report.error)
        log.info("%s of %s: %s", action, ", ".join(names), report.error or _counts(report))

    def _look_for_drift(self) -> None:
        """Compare every host with the commit that it should have, and mend what differs, or tell it."""
        state = self._state
        report = self._rbee.plan(self._branch.check_out(state.good))
        state.looked_at = self._clock()
        state.drift_error = report.error
        if report.error:
            return
        self._ledger.leave_out(report)
        for name in report.named("unreachable", "refused", "busy", "failed"):
            self._ledger.postpone(self._ledger.host(name), report.hosts[name].state, report.hosts[name].problem)
        for name in report.named("converged"):
            state.hosts[name] = HostRecord(revision=state.good, state="converged")
        drifted = report.named("changed")
        for name in drifted:
            host = self._ledger.host(name)
            if host.revision != state.good:  # behind, not changed by hand
                host.state, host.retry_at = "waiting", 0.0
                continue
            log.warning("%s drifted: %s", name, report.hosts[name].problem)
            if host.state != "drifted":
                self._ledger.audit("drift", state.good, "found", error=f"{name}: {report.hosts[name].problem}")
            host.state, host.error = "drifted", report.hosts[name].problem
        healed = [name for name in drifted if self._state.hosts[name].state == "drifted"]
        if healed and self.options.heal:
            self._ledger.tell()
            self._catch_up("heal", healed)
        self._ledger.settle()

    def _give_up(self, why: str) -> None:
        """Put off what could not even be begun."""
        state = self._state
        log.error("%s", why)
        state.restoring = False
        if state.followed != state.good:
            self._ledger.fail(state.followed, why, self._clock(), Report(error=why))
            return
        state.looked_at = self._clock()
        for host in state.hosts.values():
            if host.state != "converged":
                self._ledger.postpone(host, "failed", why)

    def _away(self) -> list[str]:
        return [name for name, host in self._state.hosts.items() if host.state == "unreachable"]

    def is_idle(self) -> bool:
        """Tell whether nothing is due at present."""
        return next_action(self._state, self._clock(), self.options.drift_interval_s) is None


def _counts(report: Report) -> str:
    states = [result.state for result in report.hosts.values()]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "no hosts"
