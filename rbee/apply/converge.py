"""An apply, as one straight line: read the inventory, lock and observe, plan, confirm, execute, verify, record."""

from __future__ import annotations

import getpass
import hashlib
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

import rbee
from rbee.apply.execute import Engine, Event, Outcome, execute, fleet_host
from rbee.apply.identity import identity_of
from rbee.apply.plan import HostPlan
from rbee.apply.records import add_to_log, state_name
from rbee.apply.ssh import Session, Ssh
from rbee.apply.survey import Survey, revision_of
from rbee.apply.templates import shipped_text
from rbee.errors import HostFailed, HostProblem, InvalidInput, RbeeError
from rbee.inventory import read
from rbee.inventory.fleet import Fleet, Host
from rbee.inventory.ssh_config import write_ssh_config
from rbee.paths import private, state_dir, write_private

MOST_AT_ONCE = 64
GRACE_S = 0.3
"""How long hosts that answered wait for one more to answer."""


@dataclass
class Planned:
    """What an apply would do: a plan for each host that was reached, a problem for each of the others."""

    fleet: Fleet
    plans: dict[str, HostPlan] = field(default_factory=dict)
    problems: dict[str, RbeeError] = field(default_factory=dict)
    jobs: dict[str, dict[str, int]] = field(default_factory=dict)
    """How many jobs run on the workers that would be drained, by host and worker."""
    late: list[Host] = field(default_factory=list)
    """Hosts that have not answered yet, when the others were not to wait for them."""

    @property
    def changed(self) -> dict[str, HostPlan]:
        """The plans that would change something."""
        return {name: plan for name, plan in self.plans.items() if not plan.is_empty}

    def add(self, late: Planned) -> None:
        """Take in what is known of the late hosts by now."""
        self.plans |= late.plans
        self.problems |= late.problems
        self.jobs |= late.jobs
        self.late = []


class Apply:
    """One apply (or plan, or drift) from its first connection to its last. Close it, or use it in a `with`."""

    def __init__(
        self,
        inventory: Path,
        *,
        limit: Iterable[str] = (),
        wave: int | None = None,
        survey: type[Survey] = Survey,
    ) -> None:
        """Read the inventory. `survey` decides what hosts should have.

        Raises: InvalidInventory with every mistake, InvalidInput, SetupProblem.
        """
        self.fleet = read(inventory)
        self.hosts = chosen(self.fleet, limit, wave)
        self.ssh = Ssh(write_ssh_config(self.fleet))
        revision = revision_of(self.fleet.folder)
        self.survey = survey(self.fleet, identity_of(self.fleet.folder), revision, state_name(revision))
        self._sessions: dict[str, Session] = {}
        self._engine = Engine(self.ssh)
        self._pool = ThreadPoolExecutor(max_workers=min(MOST_AT_ONCE, len(self.hosts)))
        self._observing: dict[Future[RbeeError | None], Host] = {}

    def __enter__(self) -> Apply:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def plan(
        self, *, lock: bool, patient: bool = True, told: Callable[[str, HostPlan | None], None] = lambda *_: None
    ) -> Planned:
        """Observe every host side by side, under its lock when something is to follow, and compare.

        Without `patient`, hosts that are silent while no other answers any more are left for `plan_late`. `told`
        hears of each host as it answers, with its plan, or None when it has a problem.
        """
        if lock and self._is_news():
            self._engine.connect_ahead(self.hosts)
        self._observing = {self._pool.submit(self._observe, host, lock=lock): host for host in self.hosts}
        planned = self._planned(told, patient=patient)
        # What was to come from the internet, or from nowhere, may lie on a host that answered later.
        for name, plan in list(planned.plans.items()):
            if any(upload.source.startswith("https:") for upload in plan.uploads):
                self._compare(fleet_host(self.fleet, name), planned)
        for name, problem in list(planned.problems.items()):
            if problem.code == "host_failed" and name in self.survey.seen:
                self._compare(fleet_host(self.fleet, name), planned)
        self._count_jobs(planned)
        return planned

    def plan_late(self) -> Planned:
        """Return the plans of the hosts that `plan` left out, once they answered or are given up."""
        planned = self._planned(lambda *_: None, patient=True)
        self._count_jobs(planned)
        return planned

    def _planned(self, told: Callable[[str, HostPlan | None], None], *, patient: bool) -> Planned:
        planned = Planned(self.fleet)
        while self._observing:
            limit_s = None if patient else GRACE_S
            answered, _ = wait(self._observing, timeout=limit_s, return_when=FIRST_COMPLETED)
            for future in answered:
                host = self._observing.pop(future)
                problem = future.result()
                if problem is None:
                    self._compare(host, planned)
                else:
                    planned.problems[host.name] = problem
                told(host.name, planned.plans.get(host.name))
            if not answered and (planned.plans or planned.problems):
                break
        planned.late = list(self._observing.values())
        return planned

    def _compare(self, host: Host, planned: Planned) -> None:
        try:
            planned.plans[host.name] = self.survey.plan(host)
            planned.problems.pop(host.name, None)
        except RbeeError as problem:
            planned.problems[host.name] = problem

    def execute(self, planned: Planned, event: Event) -> dict[str, Outcome]:
        """Carry out what differs, and keep on each host what it was brought to."""
        outcomes = {name: Outcome(name, "converged") for name in planned.plans}
        for name, problem in planned.problems.items():
            state = "unreachable" if problem.code == "host_unreachable" else "failed"
            what = problem.what if isinstance(problem, HostProblem) else problem.message
            outcomes[name] = Outcome(name, state, what, problem.hint or "")
        self._engine.event = event
        outcomes |= execute(self.fleet, planned.changed, self._engine)
        done = [name for name in planned.changed if outcomes[name].state == "converged"]
        self._each(lambda host: self._keep(host, outcomes), [host for host in self.hosts if host.name in done])
        return outcomes

    def note(self, outcomes: dict[str, Outcome]) -> None:
        """Add a line to this machine's own log of applies."""
        line = {
            "at": time.time(),
            "who": getpass.getuser(),
            "what": self.survey.what,
            "inventory": str(self.fleet.folder),
            "revision": self.survey.revision,
            "state": self.survey.state,
            "hosts": {name: [outcome.state, outcome.changes, outcome.problem] for name, outcome in outcomes.items()},
        }
        add_to_log(line)
        if len(self.hosts) == len(self.fleet.hosts) and all(o.state == "converged" for o in outcomes.values()):
            write_private(private(self._news.parent) / self._news.name, self._version.encode())

    def close(self) -> None:
        """End every session, and with it the hosts' locks."""
        self._engine.close()
        sessions = list(self._sessions.values())
        self._sessions.clear()
        with ThreadPoolExecutor(max_workers=min(MOST_AT_ONCE, len(sessions) or 1)) as pool:
            list(pool.map(Session.close, sessions))
        self._pool.shutdown(cancel_futures=True)

    def session(self, host: Host) -> Session:
        """Return the session of a host, begun when there is none yet."""
        if host.name not in self._sessions:
            self._sessions[host.name] = Session(self.ssh, host)
        return self._sessions[host.name]

    @property
    def _news(self) -> Path:
        return state_dir() / "converged" / hashlib.sha256(str(self.fleet.folder.absolute()).encode()).hexdigest()

    @property
    def _version(self) -> str:
        return f"{self.fleet.sha256} {rbee.__version__}"

    def _is_news(self) -> bool:
        """Tell whether something is likely to be done: then the engine's imports may run while hosts are asked."""
        try:
            return self._news.read_text() != self._version
        except OSError:
            return True

    def _observe(self, host: Host, *, lock: bool) -> RbeeError | None:
        try:
            session = self._sessions[host.name] = Session(self.ssh, host)
            if lock:
                session.ask("lock", who=f"{getpass.getuser()}@{socket.gethostname()}")
            self.survey.observe(host, session)
        except RbeeError as problem:
            return problem
        return None

    def _keep(self, host: Host, outcomes: dict[str, Outcome]) -> None:
        document = msgspec.to_builtins(self.survey.wanted[host.name])
        try:
            self.session(host).ask("keep", name=self.survey.state, document=document)
            self.session(host).ask("collect", source=shipped_text("unpack.py"))
        except HostProblem as problem:
            outcomes[host.name].problem = f"it converged, but its history could not be written: {problem.what}"

    def _count_jobs(self, planned: Planned) -> None:
        """Ask the workers that would be drained how many jobs they run."""

        def count(host: Host) -> None:
            drained = [change.drains for change in planned.plans[host.name].changes if change.drains]
            wanted = self.survey.wanted[host.name]
            doors = {
                service.name: {"port": service.port, "token": service.token, "authority": wanted.authority}
                for service in wanted.services
                if service.name in drained
            }
            if doors:
                try:
                    planned.jobs[host.name] = self._sessions[host.name].ask("jobs", workers=doors)
                except HostProblem:
                    planned.jobs[host.name] = {}

        self._each(count, [host for host in self.hosts if host.name in planned.changed])

    @staticmethod
    def _each(function: Callable[[Host], None], hosts: list[Host]) -> None:
        if hosts:
            with ThreadPoolExecutor(max_workers=min(MOST_AT_ONCE, len(hosts))) as pool:
                list(pool.map(function, hosts))


def chosen(fleet: Fleet, limit: Iterable[str], wave: int | None) -> list[Host]:
    """Return the hosts that match a pattern (OpenSSH's, also on tags) and the wave. Raises: InvalidInput."""
    from fnmatch import fnmatchcase

    patterns = [part for text in limit for part in text.split(",") if part]
    hosts = [
        host
        for host in fleet.hosts
        if (wave is None or host.wave == wave)
        and (not patterns or any(fnmatchcase(name, p) for p in patterns for name in (host.name, *host.tags)))
    ]
    if not hosts:
        known = ", ".join(host.name for host in fleet.hosts) or "none"
        raise InvalidInput(f"No host of {fleet.folder} matches. Hosts: {known}")
    return hosts


def check_saved(saved: dict[str, Any], planned: Planned) -> None:
    """Raise: HostFailed when a host has moved since a plan was saved."""
    for name, fingerprint in saved["observed"].items():
        plan = planned.plans.get(name)
        if plan is None or plan.observed != fingerprint:
            raise HostFailed(name, "it has changed since the plan was saved", hint="rbee plan again")
    if saved["inventory"] != planned.fleet.sha256:
        raise InvalidInput("The inventory has changed since the plan was saved", hint="rbee plan again")
