"""A plan and an apply as people see them: what would change, how it goes on, and how it ended."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from rbee.cli.terminal import clean, console, size

if TYPE_CHECKING:
    from rbee.apply.converge import Planned
    from rbee.apply.execute import Outcome
    from rbee.apply.plan import Change, HostPlan
    from rbee.errors import RbeeError

SIGNS = {"+": "green", "~": "yellow", "-": "red"}
DIFF_COLOURS = {"+": "green", "-": "red", "@": "cyan"}
STATES = {"converged": "green", "failed": "red", "unreachable": "red", "skipped": "yellow"}


def show_plan(planned: Planned, *, diffs: bool = True) -> None:
    """Print what would change on each host, and the totals in one line."""
    for name, problem in planned.problems.items():
        what = clean(str(problem)).removeprefix(f"{name}: ")
        click.echo(click.style(f"{name}: ", bold=True) + click.style(what, fg="red"))
    for name, plan in planned.plans.items():
        if plan.is_empty:
            continue
        click.secho(f"{name}", bold=True)
        for change in plan.changes:
            _show_change(change, planned.jobs.get(name, {}), diffs=diffs)
    click.echo(totals(planned))


def _show_change(change: Change, jobs: Mapping[str, int], *, diffs: bool) -> None:
    words = [change.subject, change.detail]
    if change.size_bytes:
        words.append(f"({size(change.size_bytes)} to copy)")
    line = " ".join(word for word in words if word)
    click.echo(f"  {click.style(change.sign, fg=SIGNS[change.sign], bold=True)} {clean(line)}")
    for reason in change.reasons:
        click.echo(f"      {clean(reason)}")
    if change.drains:
        running = jobs.get(change.drains, 0)
        click.echo(f"      drained first: {running} running job{'' if running == 1 else 's'}")
    if diffs:
        for text in change.diff:
            click.secho(f"      {clean(text)}", fg=DIFF_COLOURS.get(text[:1]))


def totals(planned: Planned) -> str:
    """Return a plan's totals in one line."""
    changes = [change for plan in planned.plans.values() for change in plan.changes]
    count = {sign: sum(1 for change in changes if change.sign == sign) for sign in SIGNS}
    copied = sum(change.size_bytes for change in changes)
    unreachable = sum(1 for problem in planned.problems.values() if problem.code == "host_unreachable")
    same = sum(1 for plan in planned.plans.values() if plan.is_empty)
    parts = [f"{count['+']} to add, {count['~']} to change, {count['-']} to remove"]
    parts.append(f"on {len(planned.changed)} of {_hosts(len(planned.plans) + len(planned.problems))}")
    parts += [f"{same} as they should be"] if same else []
    parts += [f"{size(copied)} to copy"] if copied else []
    parts += [f"{unreachable} unreachable"] if unreachable else []
    parts += [f"{len(planned.late)} still silent"] if planned.late else []
    failed = len(planned.problems) - unreachable
    parts += [f"{failed} failed"] if failed else []
    return "Plan: " + "; ".join(parts)


def _hosts(count: int) -> str:
    return f"{count} host{'' if count == 1 else 's'}"


def plan_json(planned: Planned) -> dict[str, Any]:
    """Return a plan as plain values; secrets are not among them."""
    return {
        "format": "rbee plan 1",
        "inventory": planned.fleet.sha256,
        "hosts": {name: _host_json(plan) for name, plan in planned.plans.items()},
        "problems": {name: problem_json(problem) for name, problem in planned.problems.items()},
        "jobs": planned.jobs,
        "observed": {name: plan.observed for name, plan in planned.plans.items()},
        "totals": {
            sign: sum(1 for plan in planned.plans.values() for change in plan.changes if change.sign == sign)
            for sign in SIGNS
        },
        "bytes": sum(c.size_bytes for plan in planned.plans.values() for c in plan.changes),
    }


def _host_json(plan: HostPlan) -> dict[str, Any]:
    import msgspec

    return {"changes": msgspec.to_builtins(plan.changes)}


def problem_json(problem: RbeeError) -> dict[str, Any]:
    """Return an error as plain values."""
    return {"code": problem.code, "message": problem.message, "hint": problem.hint}


def show_outcomes(outcomes: Iterable[Outcome]) -> None:
    """Print how each host ended, the good ones in one line."""
    listed = list(outcomes)
    for outcome in listed:
        if outcome.state != "converged" or outcome.problem:
            state = click.style(outcome.state, fg=STATES[outcome.state], bold=True)
            click.echo(f"{click.style(outcome.host, bold=True)}: {state}: {clean(outcome.problem)}")
            if outcome.hint:
                click.echo(f"  try: {clean(outcome.hint)}")
    counts = {state: sum(1 for outcome in listed if outcome.state == state) for state in STATES}
    words = [f"{count} {state}" for state, count in counts.items() if count or state == "converged"]
    click.echo(f"Apply: {', '.join(words)}")


class Live:
    """How an apply goes on: one line a host that changes in place on a terminal, plain lines elsewhere."""

    def __init__(self, hosts: Sequence[str], *, quiet: bool = False) -> None:
        self._lines = dict.fromkeys(hosts, "waits")
        self._lock = threading.Lock()
        self._quiet = quiet
        self._on_terminal = not quiet and sys.stderr.isatty()
        self._display: Any = None

    def __enter__(self) -> Live:
        if self._on_terminal:
            from rich.live import Live as RichLive

            self._display = RichLive(console=console(stderr=True), refresh_per_second=8, transient=True)
            self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.stop()

    def event(self, host: str, told: dict[str, Any]) -> None:
        """Take what the engine tells of a host."""
        line = _line(told)
        if not line or self._quiet:
            return
        with self._lock:
            self._lines[host] = line
            if self._display is not None:
                self._display.update(self._table())
            elif told["event"] != "bytes":
                click.echo(f"{host}: {clean(line)}", err=True)

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        for host, line in self._lines.items():
            grid.add_row(Text(host, style="bold"), Text(clean(line)))
        return grid


def _line(told: dict[str, Any]) -> str:
    kind = told["event"]
    if kind == "bytes":
        share = told["done"] / told["total"] if told.get("total") else 0.0
        filled = round(share * 20)
        what = told.get("name") or "packages"
        return f"sends {what}  {'━' * filled}{'╌' * (20 - filled)}  {share:4.0%}  {size(told['done'])}"
    if kind == "service":
        name = told["unit"].removeprefix("rbee-").removesuffix(".service").replace("@", " ")
        jobs = f" ({told['jobs']} running)" if told.get("jobs") else ""
        reason = f": {told['reason']}" if told.get("reason") else ""
        return f"{name} is {told['state']}{jobs}{reason}"
    if kind == "problem":
        return str(told["what"])
    if kind == "result":
        return "done" if told["ok"] else "stopped"
    return ""
