"""What the reconciler does next. Pure: it sees the state, the clock and the dice, and does nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rbee.apply.gitops.records import HostRecord, State
from rbee.wire.gitops import GitopsHost, GitopsState, GitopsStatus

HOST_FIRST_S, HOST_LONGEST_S = 5.0, 300.0
FAILED_HOST_FIRST_S = 60.0
COMMIT_FIRST_S, COMMIT_LONGEST_S = 600.0, 6 * 3600.0
FETCH_FAILURES = 3
"""So many fetches in a row may fail before the reconciler calls itself failed."""
Dice = Callable[[], float]


@dataclass(frozen=True)
class RollOut:
    """Bring the fleet to a commit that it does not have."""

    revision: str


@dataclass(frozen=True)
class Restore:
    """Bring the fleet back to `good`, after a commit that failed."""


@dataclass(frozen=True)
class CatchUp:
    """Bring hosts to `good` that lack it."""

    hosts: tuple[str, ...]


@dataclass(frozen=True)
class LookForDrift:
    """Compare every host with `good`."""


Action = RollOut | Restore | CatchUp | LookForDrift


def next_action(state: State, now: float, drift_every_s: float) -> Action | None:
    """Return what is due, the most urgent first, or None."""
    if state.restoring:
        return Restore()
    if state.followed != state.good:
        # A failed commit waits for its own time; one that met no host waits as its hosts do.
        if is_due(state.retry_at, now, COMMIT_LONGEST_S):
            return RollOut(state.followed)
        if state.followed != state.failed:
            return None
    if not state.good:
        return None
    due = tuple(
        name for name, host in state.hosts.items() if is_pending(host) and is_due(host.retry_at, now, HOST_LONGEST_S)
    )
    if due:
        return CatchUp(due)
    return LookForDrift() if is_due(state.looked_at + drift_every_s, now, drift_every_s) else None


def is_due(at: float, now: float, longest_s: float) -> bool:
    """Tell whether a time has come; one that is further away than any wait was set by a clock that was wrong."""
    return now >= at or at - now > longest_s + 1


def is_pending(host: HostRecord) -> bool:
    """Tell whether a host is to be tried again by itself."""
    return host.state not in ("converged", "drifted")


def back_off_s(attempts: int, first_s: float, longest_s: float, dice: Dice) -> float:
    """Return how long to wait after so many attempts: doubled each time, less up to a quarter (`dice` in 0…1)."""
    return float(min(longest_s, first_s * 2 ** min(attempts - 1, 30)) * (1 - dice() / 4))


def status_of(state: State, *, acting: bool, suspended: str | None) -> GitopsStatus:
    """Return what others see. `suspended` is the reason, None when it goes on."""
    return GitopsStatus(
        revision=state.settled,
        wanted=state.followed,
        state=_word(state, acting, suspended is not None),
        error="\n".join(_errors(state, suspended)),
        checked_at=state.checked_at,
        applied_at=state.applied_at,
        hosts={
            name: GitopsHost(revision=host.revision, state=host.state, error=host.error, attempts=host.attempts)
            for name, host in sorted(state.hosts.items())
        },
    )


def _word(state: State, acting: bool, suspended: bool) -> GitopsState:
    if suspended:
        return GitopsState.SUSPENDED
    bad = [host for host in state.hosts.values() if host.state in ("failed", "drifted", "refused")]
    given_up = bool(state.failed) and state.failed == state.followed
    cut_off = state.fetch_failures >= FETCH_FAILURES or (state.fetch_error and not state.followed)
    if given_up or state.refusal or bad or cut_off or state.drift_error:
        return GitopsState.FAILED
    waiting = state.followed != state.good or any(is_pending(host) for host in state.hosts.values())
    return GitopsState.APPLYING if acting or waiting or not state.good else GitopsState.CONVERGED


def _errors(state: State, suspended: str | None) -> list[str]:
    found = [f"suspended: {suspended or 'no reason given'}"] if suspended is not None else []
    if state.refusal:
        found.append(f"refused: {state.refusal}")
    if state.failure:
        found.append(f"{state.failed[:12]} failed: {state.failure}" if state.failed else state.failure)
    found += [error for error in (state.fetch_error, state.drift_error) if error]
    return found
