"""A fleet follows a branch: commits roll out, bad ones leave it as it was, and what happens to machines is mended."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fleets import DEMO, Fleet, process_id, worker_state
from machines import Machine, Rig
from machines.commands import wait_until

UNIT = "/etc/systemd/system/rbee-worker@demo.service"
STREAMS = """
good=0
while [ ! -e /tmp/enough ]; do
    curl -sSN -m 60 --cacert /etc/rbee/secrets/ca.crt https://127.0.0.1:8001/v1/chat/completions \
        -H "Authorization: Bearer $(cat /etc/rbee/worker-tokens/demo)" -H 'Content-Type: application/json' \
        -d '{"model": "rbee-demo", "stream": true, "messages": [{"role": "user", "content": "What is a hive?"}]}' \
        | tail -c 20 | grep -q DONE || { echo broken; exit 1; }
    good=$((good + 1))
    echo $good > /tmp/good
done
echo $good whole
"""


@dataclass
class Branch:
    """A bare repository, a person's clone of it, and a reconciler's folder."""

    fleet: Fleet
    folder: Path
    environment: dict[str, str]

    @property
    def origin(self) -> Path:
        return self.folder / "origin.git"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def git(self, *words: str) -> str:
        work = self.folder / "work"
        done = subprocess.run(
            ["git", "-C", str(work), *words], capture_output=True, text=True, check=True, env=self.environment
        )
        return done.stdout.strip()

    def commit(self, *flags: str, **lines: list[str]) -> str:
        """Commit and push the inventory with these lines for each machine; return the commit."""
        self.fleet.write(**lines)
        return self.push(*flags)

    def push(self, *flags: str) -> str:
        self.git("add", "-A", ":!inventory/.rbee")
        self.git("commit", "-q", "--allow-empty", "-m", "change", *flags)
        self.git("push", "-q", "--force", "origin", "main")
        return self.git("rev-parse", "HEAD")

    @contextmanager
    def followed(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run the reconciler."""
        command = self.fleet.command(
            "gitops", "run", "--repo", str(self.origin), "--identity", str(self.fleet.folder / ".rbee"),
            "--folder", str(self.state), "--interval", "1", *words,
        )  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(command, stderr=log, env=self.fleet.environment(self.environment))
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)

    def rbee(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.fleet.rbee("gitops", *words, "--folder", str(self.state))

    def status(self) -> dict[str, Any]:
        done = self.rbee("status", "--json")
        told: dict[str, Any] = json.loads(done.stdout) if done.stdout else {"state": "", "hosts": {}}
        return told

    def reaches(self, state: str, wanted: str = "") -> dict[str, Any]:
        """Wait for a state of the reconciler, with a commit that it wants, and return its status."""
        found: dict[str, Any] = {}

        def there() -> bool:
            found.update(self.status())
            return bool(found["state"] == state and (not wanted or found["wanted"] == wanted))

        wait_until(there, f"the reconciler to be {state}; it told {found}")
        return found


@pytest.fixture(scope="module")
def branch(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Branch]:
    """Return a branch that two machines were brought to by a first apply; the first has the queen."""
    folder = tmp_path_factory.mktemp("gitops")
    person = {"GIT_CONFIG_GLOBAL": str(folder / "gitconfig"), "GIT_CONFIG_NOSYSTEM": "1"}
    (folder / "gitconfig").write_text("[user]\nname = Ada\nemail = ada@example.org\n[init]\ndefaultBranch = main\n")
    environment = {**os.environ, **person}
    for words in (("init", "-q", "--bare", "origin.git"), ("clone", "-q", "origin.git", "work")):
        subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, env=environment)
    with rig.machines(2) as machines:
        made = Branch(Fleet(folder / "work/inventory", folder / "home", machines), folder, environment)
        made.commit(**usual(machines))
        made.fleet.apply()
        yield made


@pytest.fixture
def hosts(branch: Branch) -> tuple[Machine, Machine]:
    """Return both machines, as the branch says at first; a test begins with a reconciler that never ran."""
    first, second = branch.fleet.machines
    subprocess.run(["rm", "-rf", str(branch.state)], check=True)
    branch.commit(**usual(branch.fleet.machines))
    branch.fleet.apply()
    return first, second


def usual(machines: Any) -> dict[str, list[str]]:
    return {machines[0].name: ["QueenPort 7833", DEMO], machines[1].name: [DEMO]}


def settings_of(machine: Machine) -> str:
    return machine.console("cat /etc/rbee/workers/*.yaml", check=False).stdout


def test_a_commit_is_rolled_out_while_a_stream_of_another_machine_goes_on(
    branch: Branch, hosts: tuple[Machine, Machine]
) -> None:
    first, second = hosts
    before = process_id(second, "rbee-worker@demo.service")
    with branch.followed():
        branch.reaches("converged")
        second.console("rm -f /tmp/enough /tmp/good")
        streams = subprocess.Popen(stream_command(second), stdout=subprocess.PIPE, text=True)
        wait_until(lambda: second.console("cat /tmp/good", check=False).stdout != "", "a first stream")
        commit = branch.commit(**{first.name: ["QueenPort 7833", f"{DEMO} slots=2"], second.name: [DEMO]})
        told = branch.reaches("converged", commit)
        count = second.console("cat /tmp/good").stdout
        wait_until(lambda: second.console("cat /tmp/good").stdout != count, "one more stream")
        second.console("touch /tmp/enough")
    assert "slots: 2" in settings_of(first)
    assert told["revision"] == commit
    assert {host["revision"] for host in told["hosts"].values()} == {commit}
    assert streams.communicate(timeout=60)[0].strip().endswith("whole")
    assert process_id(second, "rbee-worker@demo.service") == before
    assert commit[:12] in second_line(branch)


def stream_command(machine: Machine) -> list[str]:
    return ["ssh", "-F", str(machine.folder / "ssh_config"), f"root@{machine.name}", STREAMS]


def second_line(branch: Branch) -> str:
    return branch.rbee("history", "-n", "1").stdout


def test_a_commit_that_cannot_be_read_changes_nothing_and_is_told(
    branch: Branch, hosts: tuple[Machine, Machine]
) -> None:
    first, second = hosts
    with branch.followed():
        good = branch.reaches("converged")["revision"]
        commit = branch.commit(**{first.name: ["QueenPort 7833", "Worker demo modle=rbee-demo"], second.name: []})
        told = branch.reaches("failed", commit)
        assert "fleet.conf:" in told["error"]
        assert "modle" in told["error"]
        assert told["revision"] == good
        assert branch.rbee("status").returncode == 1
        assert (worker_state(first), worker_state(second)) == ("active", "active")
        mended = branch.commit(**usual(branch.fleet.machines))
        assert branch.reaches("converged", mended)["error"] == ""


def test_a_commit_whose_worker_does_not_come_up_is_taken_back(branch: Branch, hosts: tuple[Machine, Machine]) -> None:
    first, second = hosts
    (branch.fleet.folder / "bad.gguf").write_bytes(b"GGUF" + bytes(4096))
    bad = ["Model bad source=file:bad.gguf", "Worker other model=bad", DEMO]
    with branch.followed():
        good = branch.reaches("converged")["revision"]
        commit = branch.commit(**{first.name: ["QueenPort 7833", f"{DEMO} slots=3", *bad[:2]], second.name: bad})
        wait_until(lambda: "applied again" in branch.status()["error"], "the fleet to be taken back")
        told = branch.reaches("failed", commit)
    (branch.fleet.folder / "bad.gguf").unlink()
    assert "rbee-worker@other.service" in told["error"]
    assert told["revision"] == good
    assert {name: host["revision"] for name, host in told["hosts"].items()} == {first.name: good, second.name: good}
    assert "slots" not in settings_of(first)
    assert [worker_state(machine, name) for machine in hosts for name in ("demo", "other")] == [
        "active",
        "inactive",
    ] * 2


def test_a_rewritten_branch_is_refused_until_it_is_accepted(branch: Branch, hosts: tuple[Machine, Machine]) -> None:
    first, second = hosts
    with branch.followed():
        old = branch.reaches("converged")["revision"]
        new = branch.commit("--amend", **{first.name: ["QueenPort 7833", DEMO], second.name: [f"{DEMO} slots=2"]})
        told = branch.reaches("failed")
        assert "rewritten" in told["error"]
        assert (told["wanted"], told["revision"]) == (old, old)
        assert "slots" not in settings_of(second)
        assert branch.rbee("accept", new[:12]).returncode == 0
        branch.reaches("converged", new)
        assert "slots: 2" in settings_of(second)


def test_only_signed_commits_are_applied_when_that_is_asked(branch: Branch, hosts: tuple[Machine, Machine]) -> None:
    first, second = hosts
    key = branch.folder / "signer"
    if not key.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    branch.state.mkdir()
    public = key.with_suffix(".pub").read_text()
    (branch.state / "allowed_signers").write_text(f"ada@example.org {public}")
    sign = ["-c", "gpg.format=ssh", "-c", f"user.signingkey={key}"]
    branch.git(*sign, "commit", "-q", "-S", "--allow-empty", "-m", "signed")
    branch.git("push", "-q", "origin", "main")
    good = branch.git("rev-parse", "HEAD")
    with branch.followed("--require-signed"):
        branch.reaches("converged", good)
        commit = branch.commit(**{first.name: ["QueenPort 7833", DEMO], second.name: [f"{DEMO} slots=2"]})
        told = branch.reaches("failed")
        assert f"{commit[:12]} by Ada <ada@example.org> has no signature" in told["error"]
        assert "slots" not in settings_of(second)
        branch.git(*sign, "commit", "-q", "--amend", "-S", "-m", "signed")
        branch.git("push", "-q", "--force", "origin", "main")
        branch.reaches("converged", branch.git("rev-parse", "HEAD"))
        assert "slots: 2" in settings_of(second)
        assert "signed by ada@example.org" in branch.rbee("history", "-n", "1").stdout


def test_a_machine_that_was_off_converges_when_it_is_back(branch: Branch, hosts: tuple[Machine, Machine]) -> None:
    first, second = hosts
    with branch.followed():
        good = branch.reaches("converged")["revision"]
        second.power_off()
        commit = branch.commit(**{first.name: ["QueenPort 7833", f"{DEMO} slots=2"], second.name: [f"{DEMO} slots=2"]})
        wait_until(lambda: branch.status()["hosts"][second.name]["state"] == "unreachable", "the loss to be seen")
        told = branch.status()
        assert told["revision"] == good
        assert told["hosts"][first.name]["revision"] == commit
        wait_until(lambda: branch.rbee("status").returncode == 2, "it to say that something is still to come")
        second.power_on()
        assert branch.reaches("converged", commit)["revision"] == commit
    assert "slots: 2" in settings_of(second)


def test_what_was_changed_by_hand_is_put_back(branch: Branch, hosts: tuple[Machine, Machine]) -> None:
    _, second = hosts
    with branch.followed("--drift-interval", "2"):
        branch.reaches("converged")
        second.console(f"sed -i s/TimeoutStartSec=.*/TimeoutStartSec=7/ {UNIT}; systemctl daemon-reload")
        wait_until(
            lambda: "TimeoutStartSec=7\n" not in second.console(f"cat {UNIT}").stdout, "the unit to be as it was"
        )
        branch.reaches("converged")
        second.console("systemctl stop rbee-worker@demo.service rbee-worker@demo.socket")
        wait_until(lambda: worker_state(second) == "active", "the worker to run again")
    assert "heal: converged" in branch.rbee("history").stdout


def test_without_healing_drift_is_only_told(branch: Branch, hosts: tuple[Machine, Machine]) -> None:
    _, second = hosts
    with branch.followed("--drift-interval", "1", "--no-heal"):
        branch.reaches("converged")
        second.console(f"echo '# mine' >> {UNIT}")
        told = branch.reaches("failed")
        assert told["hosts"][second.name]["state"] == "drifted"
        assert "rbee-worker@demo.service differs" in told["hosts"][second.name]["error"]
        assert "# mine" in second.console(f"cat {UNIT}").stdout


def test_a_removed_line_removes_the_worker(branch: Branch, hosts: tuple[Machine, Machine]) -> None:
    first, second = hosts
    with branch.followed():
        branch.reaches("converged")
        commit = branch.commit(**{first.name: ["QueenPort 7833", DEMO], second.name: []})
        branch.reaches("converged", commit)
    assert worker_state(second) == "inactive"
    assert "demo" not in second.console("ls /etc/systemd/system /etc/rbee/workers").stdout


def test_a_reconciler_that_was_killed_in_the_middle_goes_on(branch: Branch, hosts: tuple[Machine, Machine]) -> None:
    first, second = hosts
    lines = {first.name: ["QueenPort 7833", f"{DEMO} slots=2"], second.name: [f"{DEMO} slots=2"]}
    with branch.followed() as process:
        branch.reaches("converged")
        commit = branch.commit(**lines)
        branch.reaches("applying", commit)
        process.kill()
        process.wait()
    assert branch.rbee("status").returncode == 3
    with branch.followed():
        branch.reaches("converged", commit)
    assert all("slots: 2" in settings_of(machine) for machine in hosts)


def test_suspended_it_looks_but_changes_nothing(branch: Branch, hosts: tuple[Machine, Machine]) -> None:
    first, second = hosts
    with branch.followed():
        branch.reaches("converged")
        branch.rbee("suspend", "--reason", "new racks")
        commit = branch.commit(**{first.name: ["QueenPort 7833", DEMO], second.name: [f"{DEMO} slots=2"]})
        told = branch.reaches("suspended", commit)
        assert "new racks" in told["error"]
        assert "slots" not in settings_of(second)
        branch.rbee("resume")
        branch.reaches("converged", commit)
    assert "slots: 2" in settings_of(second)


def test_the_queens_machine_follows_a_repository_by_itself(
    branch: Branch, hosts: tuple[Machine, Machine], rig: Rig
) -> None:
    first, second = hosts
    second.console("rm -rf /srv/fleet.git; git init -q --bare -b main /srv/fleet.git")
    where = f"root@{second.address}:/srv/fleet.git"
    ssh = f"ssh -i {second.key} -o IdentitiesOnly=yes -o UserKnownHostsFile={branch.fleet.folder / 'known_hosts'}"
    gitops = f"RbeeGitops repo={where} interval=1s key={first.key}"

    def published(**lines: list[str]) -> str:
        commit = branch.commit(**lines)
        subprocess.run(
            ["git", "-C", str(branch.folder / "work"), "push", "-q", "--force", where, "main"],
            check=True, capture_output=True, env={**branch.environment, "GIT_SSH_COMMAND": ssh},
        )  # fmt: skip
        return commit

    def told(state: str, wanted: str) -> Callable[[], bool]:
        def there() -> bool:
            text = first.console("cat /var/lib/rbee/gitops/status.json", check=False).stdout
            status = json.loads(text or "{}")
            return bool(status.get("state") == state and status.get("wanted") == wanted)

        return there

    queen = ["QueenPort 7833", gitops, DEMO]
    commit = published(**{first.name: queen, second.name: [DEMO]})
    first.console("mv /usr/bin/git /usr/bin/git.away")
    refused = branch.fleet.plan()
    assert refused.returncode == 1
    assert "RbeeGitops needs git there" in refused.stdout
    first.console("mv /usr/bin/git.away /usr/bin/git")
    branch.fleet.apply()
    wait_until(told("converged", commit), "the queen's machine to follow", 240)
    releases = [machine.console("readlink /opt/rbee/current").stdout for machine in hosts]
    # This also restarts the reconciler in the middle of its own apply.
    queen[1] = gitops.replace("interval=1s", "interval=2s")
    commit = published(**{first.name: [*queen[:2], f"{DEMO} slots=2"], second.name: [f"{DEMO} slots=2"]})
    wait_until(told("converged", commit), "a commit to be applied from there", 240)
    assert all("slots: 2" in settings_of(machine) for machine in hosts)
    assert "interval_s: 2" in first.console("cat /etc/rbee/gitops.yaml").stdout
    # What the machine sends on is byte by byte what it was sent.
    assert releases == [machine.console("readlink /opt/rbee/current").stdout for machine in hosts]
    seen = first.console("curl -sS http://127.0.0.1:7833/gitops/status").stdout
    assert json.loads(seen)["wanted"] == commit
    # A person asks as root; the reconciler is another user.
    for words in ("suspend --reason racks", "status"):
        shown = first.console(f"/opt/rbee/current/bin/rbee gitops {words}", check=False)
    wait_until(told("suspended", commit), "the reconciler to be suspended")
    assert commit[:12] in shown.stdout
    first.console("/opt/rbee/current/bin/rbee gitops resume")
    wait_until(told("converged", commit), "the reconciler to go on")
    branch.commit(**usual(branch.fleet.machines))
    branch.fleet.apply()
    assert "rbee-gitops" not in first.console("ls /etc/systemd/system /etc/rbee/secrets").stdout
    assert "ca.key" not in first.console("ls /etc/rbee/secrets").stdout
