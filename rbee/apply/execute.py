"""Carry plans out: waves, their canaries, and what became of each host."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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
    """Carry out each plan, wave by wave; a wave with a host that failed stops the later ones."""
    outcomes: dict[str, Outcome] = {}
    hosts = sorted((fleet_host(fleet, name) for name in plans), key=lambda host: host.wave)
    for wave, members in groupby(hosts, key=lambda host: host.wave):
        outcomes |= engine.run([(host, plans[host.name]) for host in members], fleet.hosts)
        failed = [name for name, outcome in outcomes.items() if outcome.state == "failed"]
        if failed:
            for host in hosts:
                outcomes.setdefault(host.name, Outcome(host.name, "skipped", f"wave {wave} failed on {failed[0]}"))
            break
    return outcomes


def fleet_host(fleet: Fleet, name: str) -> Host:
    """Return a host that is known to be in the fleet."""
    host = fleet.host(name)
    assert host is not None
    return host


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

    def connect_ahead(self, hosts: list[Host]) -> None:
        """Start the process, and agents on hosts that are likely to be worked on."""
        self.start()
        with contextlib.suppress(OSError):  # `run` will tell
            self._send([], hosts)

    def run(self, members: list[tuple[Host, HostPlan]], holders: list[Host]) -> dict[str, Outcome]:
        """Carry out a wave and return what became of each host. Raises: SetupProblem."""
        self.start()
        assert self._process is not None
        began = time.monotonic()
        outcomes = {h.name: Outcome(h.name, "failed", "the engine ended", changes=len(p.changes)) for h, p in members}
        try:
            self._send(members, holders)
        except OSError:
            raise SetupProblem("The engine that runs pyinfra ended", hint="rbee doctor") from None
        assert self._process.stdout
        for host, told in _events(self._process.stdout):
            if told["event"] == "batch-done":
                return outcomes
            self._take(outcomes[host], told, began)
            self.event(host, told)
        return outcomes

    def _send(self, members: list[tuple[Host, HostPlan]], holders: list[Host]) -> None:
        batch = Batch(
            ssh_config=str(self._ssh.config),
            sockets=str(self._ssh.sockets),
            connect_limit_s=self._ssh.connect_limit_s,
            members=[Member(host=host, plan=plan) for host, plan in members],
            holders=holders,
        )
        assert self._process is not None
        assert self._process.stdin
        self._process.stdin.write(encode(batch))
        self._process.stdin.flush()

    def close(self) -> None:
        """End the process. What it began on hosts ends there by itself."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._process = None

    @staticmethod
    def _take(outcome: Outcome, told: dict[str, Any], began: float) -> None:
        if told["event"] == "problem":
            outcome.problem, outcome.hint = told["what"], told.get("hint") or ""
            outcome.details = {"code": told.get("code", "")}
        if told["event"] == "skipped":
            outcome.state, outcome.problem = "skipped", told["why"]
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
