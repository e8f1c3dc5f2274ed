"""`rbee plan` and `rbee apply` as child processes: an inventory that breaks them breaks nothing here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rbee.apply.gitops.programs import Done, Programs
from rbee.apply.identity import IDENTITY_VARIABLE
from rbee.apply.ssh import KEY_VARIABLE
from rbee.errors import TimedOut

PLAN_LIMIT_S, APPLY_LIMIT_S = 1200.0, 6 * 3600.0
OF_THE_HOST = {"host_unreachable": "unreachable", "host_refused": "refused", "host_busy": "busy"}
"""Problems that no commit causes: its host is tried again, and the others go on."""
ERROR_LINES = 12


@dataclass(frozen=True)
class HostResult:
    """What a child told of one host: converged, changed, unreachable, refused, busy, failed or skipped."""

    state: str
    problem: str = ""
    changes: int = 0


@dataclass(frozen=True)
class Report:
    """What a child told. With `error` it ended before it did anything."""

    error: str = ""
    hosts: dict[str, HostResult] = field(default_factory=dict)

    def named(self, *states: str) -> list[str]:
        """Return the hosts of these states, in order."""
        return [name for name, result in self.hosts.items() if result.state in states]

    def reasons(self, *states: str) -> str:
        """Return what is the matter with hosts of these states, one line each."""
        return "\n".join(f"{name}: {self.hosts[name].problem}" for name in self.named(*states))


@dataclass
class Rbee:
    """Starts children on an inventory folder."""

    programs: Programs
    folder: Path
    """Where they work; nothing is imported from there."""
    identity: Path
    ssh_key: Path | None = None

    def plan(self, inventory: Path) -> Report:
        """Compare all hosts with an inventory. Raises: ShuttingDown."""
        done = self._run("plan", str(inventory), "--json", limit_s=PLAN_LIMIT_S)
        told = _told(done)
        return Report(error=_error(done)) if told is None else Report(hosts=_planned(told))

    def apply(self, inventory: Path, only: Iterable[str] = ()) -> Report:
        """Bring hosts, all or only some, to an inventory. Raises: ShuttingDown."""
        limits = [word for name in only for word in ("--limit", name)]
        done = self._run("apply", str(inventory), "--yes", "--json", *limits, limit_s=APPLY_LIMIT_S)
        told = _told(done)
        return Report(error=_error(done)) if told is None else Report(hosts=_applied(told))

    def _run(self, *words: str, limit_s: float) -> Done:
        environment = {**os.environ, IDENTITY_VARIABLE: str(self.identity), "NO_COLOR": "1", "TERM": "dumb"}
        if self.ssh_key:
            environment[KEY_VARIABLE] = str(self.ssh_key)
        command = [sys.executable, *_flags(), "-m", "rbee.cli.main", *words]
        try:
            return self.programs.run(command, limit_s=limit_s, env=environment, cwd=self.folder)
        except TimedOut as problem:
            return Done(1, "", str(problem))


def _flags() -> list[str]:
    """Return what Python was started with here: a release keeps out the host's own packages, and names itself."""
    named = [word for name, value in sys._xoptions.items() for word in ("-X", f"{name}={value}")]
    return [*named, *(["-S"] if sys.flags.no_site else []), "-P"]


def _told(done: Done) -> dict[str, Any] | None:
    try:
        told = json.loads(done.output)
    except ValueError:
        return None
    return told if isinstance(told, dict) else None


def _error(done: Done) -> str:
    lines = [line.removeprefix("rbee: ") for line in done.words.splitlines() if line.strip()]
    return "\n".join(lines[:ERROR_LINES]) or f"rbee ended with {done.code} and no words"


def _planned(told: Mapping[str, Any]) -> dict[str, HostResult]:
    hosts = {name: _of_plan(plan["changes"]) for name, plan in told["hosts"].items()}
    return hosts | _problems(told["problems"])


def _of_plan(changes: list[dict[str, Any]]) -> HostResult:
    what = "; ".join(" ".join(filter(None, (c["sign"], c["subject"], *c.get("reasons", [])))) for c in changes)
    return HostResult("changed" if changes else "converged", what, len(changes))


def _applied(told: Mapping[str, Any]) -> dict[str, HostResult]:
    hosts = {
        name: HostResult(outcome["state"], outcome.get("problem", ""), outcome.get("changes", 0))
        for name, outcome in told["outcomes"].items()
    }
    return hosts | _problems(told["plan"]["problems"])


def _problems(told: Mapping[str, Any]) -> dict[str, HostResult]:
    return {
        name: HostResult(OF_THE_HOST.get(problem["code"], "failed"), _sentence(name, problem))
        for name, problem in told.items()
    }


def _sentence(host: str, problem: Mapping[str, Any]) -> str:
    message = str(problem["message"]).removeprefix(f"{host}: ")
    return f"{message}. Try: {problem['hint']}" if problem.get("hint") else message
