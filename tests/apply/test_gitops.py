"""What the reconciler makes of commits and of what `rbee plan` and `rbee apply` tell: real git, told children."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from rbee.apply.gitops.child import HostResult, Rbee, Report
from rbee.apply.gitops.contact import Contact
from rbee.apply.gitops.options import Options
from rbee.apply.gitops.programs import Programs
from rbee.apply.gitops.reconciler import Reconciler
from rbee.apply.gitops.records import Records
from rbee.apply.gitops.schedule import back_off_s
from rbee.errors import Busy, SetupProblem
from rbee.wire.gitops import GitopsState, GitopsStatus

Fleet = dict[str, str]


class Told(Rbee):
    """The lowest seam: the children's reports. `hosts` is what each host has; `away` and `broken` befall them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Programs(threading.Event()), folder, folder)
        self.hosts: Fleet = {"h1": "", "h2": ""}
        self.away: dict[str, str] = {}
        self.broken: set[str] = set()
        self.applied: list[tuple[str, tuple[str, ...]]] = []

    def _wanted(self, inventory: Path) -> str:
        return (inventory / "fleet.conf").read_text()

    def plan(self, inventory: Path) -> Report:
        wanted = self._wanted(inventory)
        if wanted == "unreadable":
            return Report(error="fleet.conf:1: neither rbee nor OpenSSH knows 'unreadable'")
        return Report(hosts={name: self._looked(name, wanted) for name in self.hosts})

    def _looked(self, name: str, wanted: str) -> HostResult:
        if name in self.away:
            return HostResult(self.away[name], "no answer")
        return HostResult("converged") if self.hosts[name] == wanted else HostResult("changed", "~ hive", 1)

    def apply(self, inventory: Path, only: Iterable[str] = ()) -> Report:
        wanted, only = self._wanted(inventory), tuple(only)
        self.applied.append((wanted, only))
        found: dict[str, HostResult] = {}
        for name in only or self.hosts:
            if name in self.away:
                found[name] = HostResult(self.away[name], "no answer")
            elif any(result.state == "failed" for result in found.values()):
                found[name] = HostResult("skipped", "an earlier one failed")
            elif wanted in self.broken:
                found[name] = HostResult("failed", "rbee-worker@demo.service did not become ready")
            else:
                self.hosts[name] = wanted
                found[name] = HostResult("converged", changes=1)
        return Report(hosts=found)


class World:
    """A repository, a clock, a fleet and the reconciler that is tried."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.origin = folder, folder / "origin"
        self.now = 1_000_000.0
        self.rbee = Told(folder)
        self.running: Reconciler | None = None
        self.reached: set[tuple[str, int]] = set()
        (folder / "identity").mkdir()
        (folder / "identity/ca.crt").write_text("")
        config = folder / "gitconfig"
        config.write_text("[user]\nname = Ada\nemail = ada@example.org\n[init]\ndefaultBranch = main\n")
        self.env = {**os.environ, "GIT_CONFIG_GLOBAL": str(config), "GIT_CONFIG_NOSYSTEM": "1"}
        subprocess.run(["git", "init", "-q", str(self.origin)], check=True, env=self.env)
        (self.origin / "inventory").mkdir()

    @property
    def records(self) -> Records:
        return Records(self.folder / "state")

    def git(self, *words: str) -> str:
        command = ["git", "-C", str(self.origin), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=self.env).stdout.strip()

    def commit(self, text: str, *flags: str) -> str:
        (self.origin / "inventory/fleet.conf").write_text(text)
        self.git("add", "-A")
        self.git("commit", "-q", "-m", text, *flags)
        return self.git("rev-parse", "HEAD")

    def reconciler(self, **more: Any) -> Reconciler:
        options = Options(
            repository=str(self.origin), branch="main", path="inventory", folder=self.folder / "state",
            identity=self.folder / "identity", **more,
        )  # fmt: skip
        contact = Contact(probe=lambda address: address in self.reached)
        return Reconciler(options, rbee=self.rbee, contact=contact, clock=lambda: self.now, dice=lambda: 0.5)

    def run(self, after_s: float = 0.0, **more: Any) -> GitopsStatus:
        """Let time pass, then start a reconciler anew and let it do what is due: it has its files alone to go by."""
        self.now += after_s
        self.reconciler(**more).run(once=True)
        return self.told()

    def told(self) -> GitopsStatus:
        told = self.records.status()
        assert told is not None
        return told

    def goes_on(self, after_s: float) -> GitopsStatus:
        """Let time pass for a reconciler that keeps running."""
        self.now += after_s
        if self.running is None:
            self.running = self.reconciler()
            self.running.records.folder.mkdir(exist_ok=True)
            self.running.begin()
        self.running.step()
        while not self.running.is_idle():
            self.running.step()
        return self.told()

    def actions(self) -> list[tuple[str, str]]:
        return [(entry["action"], entry["result"]) for entry in self.records.history(100)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_commit_reaches_every_host_and_is_in_the_history(world: World) -> None:
    revision = world.commit("one")
    told = world.run()
    assert (told.state, told.revision, told.wanted) == (GitopsState.CONVERGED, revision, revision)
    assert world.rbee.hosts == {"h1": "one", "h2": "one"}
    [entry] = world.records.history(10)
    assert (entry["revision"], entry["author"], entry["subject"]) == (revision, "Ada <ada@example.org>", "one")
    assert world.run(60).applied_at == told.applied_at
    assert len(world.rbee.applied) == 1


def test_a_commit_that_fails_is_taken_back_and_not_tried_at_once(world: World) -> None:
    good = world.commit("good")
    world.run()
    bad = world.commit("bad")
    world.rbee.broken = {"bad"}
    told = world.run()
    assert (told.state, told.revision, told.wanted) == (GitopsState.FAILED, good, bad)
    assert "h1: rbee-worker@demo.service did not become ready" in told.error
    assert f"{good[:12]} was applied again" in told.error
    assert world.rbee.hosts == {"h1": "good", "h2": "good"}
    tried = [wanted for wanted, _ in world.rbee.applied].count("bad")
    world.run(60)
    assert [wanted for wanted, _ in world.rbee.applied].count("bad") == tried
    world.run(3600)
    assert [wanted for wanted, _ in world.rbee.applied].count("bad") == tried + 1


def test_a_failed_commit_is_tried_again_when_asked(world: World) -> None:
    world.commit("good")
    world.run()
    world.commit("bad")
    world.rbee.broken = {"bad"}
    world.run()
    world.rbee.broken = set()
    world.records.ask_sync()
    assert world.run().state == GitopsState.CONVERGED
    assert world.rbee.hosts == {"h1": "bad", "h2": "bad"}


def test_an_unreadable_commit_touches_no_host(world: World) -> None:
    good = world.commit("good")
    world.run()
    world.commit("unreadable")
    told = world.run()
    assert (told.state, told.revision) == (GitopsState.FAILED, good)
    assert "fleet.conf:1" in told.error
    assert [wanted for wanted, _ in world.rbee.applied] == ["good"]


def test_a_host_that_is_away_is_caught_up_alone(world: World) -> None:
    world.rbee.away = {"h2": "unreachable"}
    revision = world.commit("one")
    told = world.goes_on(0)
    assert (told.state, told.revision) == (GitopsState.APPLYING, "")
    assert told.hosts["h1"].revision == revision
    assert (told.hosts["h2"].state, told.hosts["h2"].attempts) == ("unreachable", 1)
    assert world.goes_on(2).hosts["h2"].attempts == 1
    assert world.goes_on(4).hosts["h2"].attempts == 2
    world.rbee.away = {}
    told = world.goes_on(300)
    assert (told.state, told.revision) == (GitopsState.CONVERGED, revision)
    assert world.rbee.applied[-1] == ("one", ("h2",))


def test_a_host_that_answers_again_does_not_wait_for_its_time(world: World) -> None:
    world.rbee.away = {"h2": "unreachable"}
    text = "Host h1\n    HostName 192.0.2.1\nHost h2\n    HostName 192.0.2.2\n    Port 2222\n"
    world.commit(text)
    for _ in range(5):
        world.goes_on(99)
    world.rbee.away = {}
    assert world.goes_on(11).state == GitopsState.APPLYING
    world.reached = {("192.0.2.2", 2222)}
    assert world.goes_on(11).state == GitopsState.CONVERGED


def test_a_fleet_that_is_all_away_says_nothing_about_a_commit(world: World) -> None:
    world.commit("one")
    world.run()
    world.rbee.away = {"h1": "unreachable", "h2": "busy"}
    world.commit("two")
    assert world.run().state == GitopsState.APPLYING
    assert world.rbee.hosts == {"h1": "one", "h2": "one"}
    world.rbee.away = {}
    assert world.run(10).state == GitopsState.CONVERGED
    assert world.rbee.hosts == {"h1": "two", "h2": "two"}


def test_a_host_that_failed_before_does_not_hold_up_commits(world: World) -> None:
    world.commit("one")
    world.run()
    world.rbee.away = {"h2": "failed"}
    world.run(700)
    revision = world.commit("two")
    told = world.run()
    assert world.rbee.hosts["h1"] == "two"
    assert told.hosts["h1"].revision == revision
    assert (told.state, told.hosts["h2"].state) == (GitopsState.FAILED, "failed")


def test_a_rewritten_branch_is_refused_until_accepted_or_back(world: World) -> None:
    first = world.commit("one")
    world.commit("two")
    world.run()
    world.git("reset", "-q", "--hard", first)
    other = world.commit("three")
    told = world.run(100)
    assert (told.state, told.error.startswith("refused:")) == (GitopsState.FAILED, True)
    assert f"rbee gitops accept {other[:12]}" in told.error
    assert world.rbee.hosts == {"h1": "two", "h2": "two"}
    assert world.run(100).state == GitopsState.FAILED
    assert world.actions().count(("refuse", "refused")) == 1
    world.records.ask_accept(other[:12])
    told = world.run(100)
    assert (told.state, told.revision, told.error) == (GitopsState.CONVERGED, other, "")


def test_a_commit_that_the_branch_does_not_contain_cannot_be_accepted(world: World) -> None:
    world.commit("one")
    world.run()
    world.records.ask_accept("0123456789ab")
    assert world.run(1).state == GitopsState.CONVERGED
    assert world.actions()[-1] == ("accept", "refused")
    assert world.rbee.hosts == {"h1": "one", "h2": "one"}


def test_a_death_between_a_failure_and_its_taking_back_is_survived(world: World) -> None:
    world.commit("good")
    world.run()
    world.commit("bad")
    world.rbee.broken = {"bad"}
    world.rbee.hosts["h1"] = "half"
    reconciler = world.reconciler()

    def die() -> None:
        raise KeyboardInterrupt

    reconciler._restore = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        reconciler.run(once=True)
    world.run()
    assert world.rbee.hosts == {"h1": "good", "h2": "good"}


def test_drift_is_healed_or_told(world: World) -> None:
    world.commit("one")
    world.run()
    world.rbee.hosts["h2"] = "edited"
    told = world.run(700, heal=False)
    assert (told.state, told.hosts["h2"].state) == (GitopsState.FAILED, "drifted")
    assert world.run(700, heal=False).hosts["h2"].state == "drifted"
    assert world.actions().count(("drift", "found")) == 1
    assert world.run(700).state == GitopsState.CONVERGED
    assert world.rbee.applied[-1] == ("one", ("h2",))


def test_a_host_that_left_the_inventory_is_left_out(world: World) -> None:
    world.commit("one")
    world.run()
    del world.rbee.hosts["h2"]
    world.commit("two")
    assert set(world.run().hosts) == {"h1"}
    assert ("leave", "left") in world.actions()


def test_suspended_it_follows_but_changes_nothing(world: World) -> None:
    world.commit("one")
    world.run()
    world.records.suspend("new racks")
    revision = world.commit("two")
    world.now += 100
    reconciler = world.reconciler()
    with reconciler.records.held():
        reconciler.begin()
        reconciler.step()
    told = world.records.status()
    assert told is not None
    assert (told.state, told.wanted) == (GitopsState.SUSPENDED, revision)
    assert world.rbee.hosts == {"h1": "one", "h2": "one"}
    assert world.records.resume()
    assert world.run(100).state == GitopsState.CONVERGED


def test_a_commit_with_the_fleets_secrets_is_not_applied(world: World) -> None:
    (world.origin / "inventory/.rbee").mkdir()
    (world.origin / "inventory/.rbee/fleet.key").write_text("secret")
    world.commit("one")
    assert "the fleet's secrets" in world.run().error
    assert world.rbee.applied == []


def test_an_unreachable_repository_leaves_the_fleet_alone(world: World) -> None:
    world.commit("one")
    world.run()
    world.origin.rename(world.folder / "gone")
    told = world.run(700)
    assert (told.state, "cannot be fetched" in told.error) == (GitopsState.CONVERGED, True)
    for _ in range(3):
        told = world.run(700)
    assert told.state == GitopsState.FAILED


def test_one_reconciler_a_folder_and_none_without_the_identity(world: World) -> None:
    world.commit("one")
    with world.records.held(), pytest.raises(Busy, match=f"process {os.getpid()}"):
        world.reconciler().run(once=True)
    (world.folder / "identity/ca.crt").unlink()
    with pytest.raises(SetupProblem, match="identity"):
        world.reconciler().run(once=True)


def test_a_damaged_state_is_told_and_never_guessed(world: World) -> None:
    world.commit("one")
    world.run()
    (world.folder / "state/state.json").write_bytes(b"{")
    with pytest.raises(SetupProblem, match=r"state\.json is damaged"):
        world.reconciler().run(once=True)


@pytest.mark.parametrize(("attempts", "waits"), [(1, (3.75, 5)), (3, (15, 20)), (100, (225, 300))])
def test_waits_double_up_to_the_longest(attempts: int, waits: tuple[float, float]) -> None:
    dice: Callable[[float], Callable[[], float]] = lambda value: lambda: value  # noqa: E731
    assert (back_off_s(attempts, 5, 300, dice(1.0)), back_off_s(attempts, 5, 300, dice(0.0))) == waits


def test_a_host_that_is_behind_is_caught_up_and_not_called_drifted(world: World) -> None:
    world.rbee.away = {"h2": "unreachable"}
    world.commit("one")
    world.run()
    world.rbee.away = {}
    told = world.run(700, heal=False)
    assert (told.state, told.hosts["h2"].state) == (GitopsState.CONVERGED, "converged")
    assert not [action for action, _ in world.actions() if action == "drift"]


def test_a_child_that_dies_in_the_middle_of_a_roll_out_is_taken_back(world: World) -> None:
    good = world.commit("good")
    world.run()
    world.commit("bad")
    whole = world.rbee.apply

    def dies(inventory: Path, only: Iterable[str] = ()) -> Report:
        if (inventory / "fleet.conf").read_text() == "bad":
            world.rbee.hosts["h1"] = "bad"
            return Report(error="rbee ended with -9 and no words")
        return whole(inventory, only)

    world.rbee.apply = dies  # type: ignore[method-assign]
    told = world.run()
    assert (told.state, told.revision) == (GitopsState.FAILED, good)
    assert "ended with -9" in told.error
    assert world.rbee.hosts == {"h1": "good", "h2": "good"}


def test_a_real_child_that_is_killed_or_speaks_no_json_is_an_error_and_not_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rbee = Rbee(Programs(threading.Event()), tmp_path, tmp_path)
    (tmp_path / "inventory").mkdir()
    (tmp_path / "inventory/fleet.conf").write_text("Host a\n    Worker demo modle=x\n")
    monkeypatch.setenv("RBEE_HOME", str(tmp_path / "home"))
    report = rbee.plan(tmp_path / "inventory")
    assert "fleet.conf:2" in report.error
    assert "Traceback" not in report.error
    assert rbee.plan(tmp_path / "absent").error.startswith("There is no inventory at")
