"""Carry plans out: waves, their canaries, and what became of each host."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import IO, Any

from rbee.apply.batch import Batch, Member, encode
from rbee.apply.plan import HostPlan
from rbee.apply.ssh import Ssh
from rbee.errors import SetupProblem
from rbee.inventory.fleet import Fleet, Host

Event = Callable[[str, dict[str, Any]], None]


@dataclass
class Outcome:
    """What became of one host: converged, failed, unreachable or skipped."""

    host: str
    state: str
    problem: str = ""
    hint: str = ""
    changes: int = 0
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


def execute(fleet: Fleet, plans: Mapping[str, HostPlan], engine: Engine) -> dict[str, Outcome]:
    """Carry out each plan; wave by wave, in each the first host alone before the others.

    A canary that fails stops its wave and the later ones; one that is unreachable hands over to the next host.
    """
    outcomes: dict[str, Outcome] = {}
    hosts = sorted((fleet_host(fleet, name) for name in plans), key=lambda host: host.wave)
    for wave, members in groupby(hosts, key=lambda host: host.wave):
        _wave(list(members), plans, engine, fleet.hosts, outcomes)
        failed = [name for name, outcome in outcomes.items() if outcome.state == "failed"]
        if failed:
            _skip([h for h in hosts if h.name not in outcomes], f"wave {wave} failed on {failed[0]}", outcomes)
            break
    return outcomes


def fleet_host(fleet: Fleet, name: str) -> Host:
    """Return a host that is known to be in the fleet."""
    host = fleet.host(name)
    assert host is not None
    return host


def _wave(
    hosts: list[Host],
    plans: Mapping[str, HostPlan],
    engine: Engine,
    holders: list[Host],
    outcomes: dict[str, Outcome],
) -> None:
    left = list(hosts)
    while left:
        canary = left.pop(0)
        outcomes |= engine.run([(canary, plans[canary.name])], holders)
        if outcomes[canary.name].state == "failed":
            _skip(left, f"{canary.name}, the first of its wave, failed", outcomes)
            return
        if outcomes[canary.name].state == "converged":
            break
    if left:
        outcomes |= engine.run([(host, plans[host.name]) for host in left], holders)


def _skip(hosts: Iterable[Host], why: str, outcomes: dict[str, Outcome]) -> None:
    for host in hosts:
        outcomes[host.name] = Outcome(host.name, "skipped", why)


class Engine:
    """The child process that runs pyinfra, started with the first batch; `event` hears what goes on."""

    def __init__(self, ssh: Ssh) -> None:
        self._ssh = ssh
        self.event: Event = lambda host, told: None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, so that its imports run while something else is waited for."""
        if self._process is None:
            command = [sys.executable, "-m", "rbee.apply.engine"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, members: list[tuple[Host, HostPlan]], holders: list[Host]) -> dict[str, Outcome]:
        """Carry out plans side by side and return what became of each host. Raises: SetupProblem."""
        self.start()
        assert self._process is not None
        batch = Batch(
            ssh_config=str(self._ssh.config),
            sockets=str(self._ssh.sockets),
            connect_limit_s=self._ssh.connect_limit_s,
            members=[Member(host=host, plan=plan) for host, plan in members],
            holders=holders,
        )
        began = time.monotonic()
        outcomes = {h.name: Outcome(h.name, "failed", "the engine ended", changes=len(p.changes)) for h, p in members}
        try:
            assert self._process.stdin
            self._process.stdin.write(encode(batch))
            self._process.stdin.flush()
        except OSError:
            raise SetupProblem("The engine that runs pyinfra ended", hint="rbee doctor") from None
        assert self._process.stdout
        for host, told in _events(self._process.stdout):
            if told["event"] == "batch-done":
                return outcomes
            self._take(outcomes[host], told, began)
            self.event(host, told)
        return outcomes

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            assert self._process.stdin
            self._process.stdin.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()

    @staticmethod
    def _take(outcome: Outcome, told: dict[str, Any], began: float) -> None:
        if told["event"] == "problem":
            outcome.problem, outcome.hint = told["what"], told.get("hint") or ""
            outcome.details = {"code": told.get("code", "")}
        if told["event"] == "result":
            outcome.seconds = round(time.monotonic() - began, 3)
            lost = not told["reachable"] or outcome.details.get("code") == "host_unreachable"
            outcome.state = "converged" if told["ok"] else "unreachable" if lost else "failed"
            if told["ok"]:
                outcome.problem = ""
            elif outcome.problem == "the engine ended":
                outcome.problem = "the connection was lost" if lost else "an operation failed"


def _events(stream: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in stream:
        told = json.loads(line)
        yield told.pop("host"), told
