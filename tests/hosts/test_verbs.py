"""The verbs around an apply, on real machines: rollback, status, history, logs, ssh, keys, install, and the way out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from machines import Machine, Rig, wait_until

GUARD_S = 240
ROOT = "/var/lib/rbee"
NOISE = (
    "etc/group-", "etc/gshadow-", "etc/passwd-", "etc/shadow-", "etc/.pwd.lock", "var/log/", "root/.ssh", "run/",
    "tmp/", "var/tmp/", "var/lib/systemd/", "etc/machine-id", "etc/ssh/", "var/lib/private",
)  # fmt: skip


@dataclass
class Operator:
    """Someone with rbee, a home of their own and an inventory of one machine."""

    home: Path
    folder: Path
    machine: Machine

    def write(self, *lines: str) -> None:
        """Write the inventory: the machine, with these lines in its block."""
        own = f"    HostName {self.machine.address}\n    User root\n    IdentityFile {self.machine.key}\n"
        block = f"Host {self.machine.name}\n{own}    IdentitiesOnly yes\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "hives.conf").write_text(block + "".join(f"    {line}\n" for line in lines))
        (self.folder / "known_hosts").write_text(self.machine.known_hosts_line() + "\n")

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a command."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RBEE_", "XDG_"))}
        ports = {"RBEE_QUEEN_PORT": "0", "RBEE_HIVE_PORT": "0"}
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "rbee.cli.main", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.home,
            env={**kept, **ports, "RBEE_HOME": str(self.home)},
            # A shell starts its background jobs with SIGINT ignored, and tests may be such a job.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def rbee(self, *words: str, code: int = 0) -> str:
        """Run a command that must end with `code`; return what it printed, errors after the rest."""
        with self.start(*words) as process:
            out, err = process.communicate(timeout=GUARD_S)
        assert "Traceback" not in err, err
        assert process.returncode == code, f"{words}: {process.returncode}\n{out}{err}"
        return out + err

    def files(self, pattern: str) -> list[str]:
        """Return the names of files on the machine."""
        return sorted(path.name for path in self.machine.disk.root.glob(pattern))


def tree(machine: Machine) -> set[str]:
    """Return the machine's files with their kind, rights, owner and size, apart from what any login changes."""
    root = machine.disk.root
    command = ["find", str(root), "-xdev", "-path", f"{root}/proc", "-prune", "-o", "-printf", r"%P %y %m %u:%g %s\n"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = set()
    for line in lines:
        path, kind, *rest = line.rsplit(" ", 4)
        if not path.startswith(NOISE):
            # The size of a folder is its file system's business.
            found.add(f"{path} {kind} {' '.join(rest if kind != 'd' else rest[:2])}")
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache of releases that operators share: packing one takes longer than sending it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def operator(rig: Rig, machine: Machine, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    """Return the operator of a machine with queen, hive and a worker, which tests leave ready."""
    home = tmp_path_factory.mktemp("operator")
    (home / "cache").symlink_to(cache)
    made = Operator(home, home / "inventory", machine)
    made.write("QueenPort 7833", "Worker first model=rbee-demo slots=1")
    said = made.rbee("apply", "--yes")
    assert f"http://{machine.address}:7833/v1" in said
    assert f"rbee key create NAME --host {machine.name}" in said
    return made


@pytest.fixture
def before(operator: Operator) -> Iterator[Operator]:
    """Return the operator; the inventory is applied as it was, after the test."""
    yield operator
    operator.write("QueenPort 7833", "Worker first model=rbee-demo slots=1")
    operator.rbee("apply", "--yes", "--yes-prune")


def test_rollback_undoes_the_last_apply_and_is_undone_itself(before: Operator) -> None:
    before.write("QueenPort 7833", "Worker first model=rbee-demo slots=2", "Worker second model=rbee-demo")
    before.rbee("apply", "--yes")
    assert before.files("etc/rbee/workers/*") == ["first.yaml", "second.yaml"]
    settings = before.machine.disk.root / "etc/rbee/workers/first.yaml"

    assert "rbee plan" in before.rbee("rollback", before.machine.name, "--yes")
    assert before.files("etc/rbee/workers/*") == ["first.yaml"]
    assert "slots: 1" in settings.read_text()
    assert before.machine.console("systemctl is-active rbee-worker@second", check=False).stdout.strip() == "inactive"
    assert "worker second" in before.rbee("plan", code=2)
    told = json.loads(before.rbee("history", before.machine.name, "--json"))
    assert told["audit"][-1]["what"] == "rollback"
    assert [state["revision"] for state in told["states"]][-1] == told["states"][-3]["revision"]

    before.rbee("rollback", "--yes")
    assert before.files("etc/rbee/workers/*") == ["first.yaml", "second.yaml"]
    assert "slots: 2" in settings.read_text()


def test_rollback_after_a_failed_apply_goes_to_the_last_state_that_converged(before: Operator) -> None:
    (before.home / "broken.gguf").write_bytes(b"GGUF, but not really")
    broken = (f"Model broken source=file:{before.home / 'broken.gguf'}", "Worker broken model=broken")
    before.write("QueenPort 7833", "Worker first model=rbee-demo slots=1", *broken)
    before.rbee("apply", "--yes", code=3)
    present = json.loads(before.rbee("history", before.machine.name, "--json"))
    assert present["audit"][-1]["error"]

    before.rbee("rollback", "--yes")
    after = json.loads(before.rbee("history", before.machine.name, "--json"))
    assert after["states"][-1]["revision"] == present["states"][-1]["revision"]
    assert before.files("etc/rbee/workers/*") == ["first.yaml"]
    assert before.machine.failed_units() == []
    before.write("QueenPort 7833", "Worker first model=rbee-demo slots=1")
    before.rbee("status")


def test_rollback_to_an_unknown_state_lists_what_there_is(operator: Operator) -> None:
    said = operator.rbee("rollback", "--to", "no-such-state", code=4)
    for state in json.loads(operator.rbee("history", operator.machine.name, "--json"))["states"]:
        assert state["name"] in said


def test_an_apply_deletes_releases_that_no_state_names(before: Operator) -> None:
    kept, old = "00000000000000aa", "00000000000000bb"
    document = json.dumps({"release": kept})
    before.machine.ssh(
        f"cd /opt/rbee/releases && mkdir {kept} {old} && echo '{{\"layers\": []}}' | tee {kept}/release.json "
        f"> {old}/release.json; cat > {ROOT}/history/20000101T000000Z-long-ago.json",
        stdin=document,
    )
    before.write("QueenPort 7833", "Worker first model=rbee-demo slots=3")
    before.rbee("apply", "--yes")
    releases = before.files("opt/rbee/releases/*")
    assert kept in releases
    assert old not in releases
    before.machine.ssh(f"rm {ROOT}/history/20000101T000000Z-long-ago.json")


def test_status_shows_what_is_not_ready_and_who_is_unreachable(operator: Operator, rig: Rig) -> None:
    name = operator.machine.name
    whole = json.loads(operator.rbee("status", "--json"))
    assert [(host["host"], host["state"]) for host in whole["hosts"]] == [(name, "ready")]
    [worker] = whole["hosts"][0]["workers"]
    assert (worker["unit"], worker["state"], worker["model"], worker["jobs"]) == ("active", "ready", "rbee-demo", 0)
    assert [hive["hive"] for hive in whole["queen"]["hives"]] == [name]
    assert "first" in operator.rbee("status")

    operator.machine.ssh("systemctl stop rbee-worker@first.service")
    said = operator.rbee("status", code=1)
    assert "not ready: first" in said
    operator.rbee("apply", "--yes")

    with (operator.folder / "hives.conf").open("a") as file:
        file.write(f"Host away\n    HostName {rig.network.address(240)}\n")
    states = {host["host"]: host["state"] for host in json.loads(operator.rbee("status", "--json", code=3))["hosts"]}
    assert states == {name: "ready", "away": "unreachable"}
    operator.write("QueenPort 7833", "Worker first model=rbee-demo slots=1")


def test_logs_are_those_of_the_service_that_was_named(operator: Operator) -> None:
    name = operator.machine.name
    assert "worker first" in operator.rbee("logs", name, "first", "-n", "1000")
    everything = operator.rbee("logs", name, "-n", "10000")
    assert all(unit in everything for unit in ("rbee-queen.service", "rbee-hive.service", "rbee-worker@first.service"))
    assert "rbee-hive.service" not in operator.rbee("logs", name, "queen", "-n", "1000")
    assert operator.rbee("logs", name, "hive", "--since", "2099-01-01") == ""
    assert "first" in operator.rbee("logs", name, "nobody", code=4)
    assert "--since" in operator.rbee("logs", name, "--since", "the day before", code=1)


def test_logs_that_are_followed_end_with_ctrl_c_here_and_there(operator: Operator) -> None:
    with operator.start("logs", operator.machine.name, "hive", "-f", "-n", "1") as process:
        assert process.stdout
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=GUARD_S)
    assert (process.returncode, said) == (130, "")
    wait_until(
        lambda: operator.machine.console("pgrep journalctl", check=False).returncode == 1, "journalctl to end there"
    )


def test_ssh_passes_on_output_and_exit_code(operator: Operator) -> None:
    assert operator.rbee("ssh", operator.machine.name, "--", "hostname; exit 7", code=7).startswith(
        operator.machine.name
    )
    assert operator.machine.name in operator.rbee("ssh", "nobody", code=4)


def test_keys_are_made_at_the_queen_and_stay_her_user_s(operator: Operator) -> None:
    name = operator.machine.name
    url = f"http://{operator.machine.address}:7833/v1/models"

    def asked(key: str) -> int:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
        try:
            with urllib.request.urlopen(request, timeout=GUARD_S) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as problem:
            with problem:
                return problem.code

    key = operator.rbee("key", "create", "a; $(name)", "--host", name, "-q").strip()
    assert asked(key) == 200
    [listed] = json.loads(operator.rbee("key", "list", "--host", name, "--json"))
    assert listed["name"] == "a; $(name)"
    owner = operator.machine.ssh(f"stat -c '%U %a' {ROOT}/queen/state/keys.sqlite").stdout.strip()
    assert owner == "rbee 600"
    operator.rbee("key", "revoke", listed["id"], "--host", name)
    assert asked(key) == 401


def test_the_log_of_this_machine_names_what_was_done(operator: Operator) -> None:
    [last] = json.loads(operator.rbee("history", "-n", "1", "--json"))
    assert operator.machine.name in last["hosts"]
    assert str(operator.folder) in operator.rbee("history")


def test_a_hive_is_installed_listed_and_removed_without_a_trace(
    fresh_machine: Machine, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").symlink_to(cache)
    owner = Operator(tmp_path, tmp_path / "config", fresh_machine)
    owner.write("HivePort 7835")
    name = fresh_machine.name
    fresh_machine.ssh("systemctl daemon-reload")
    untouched = tree(fresh_machine)
    owner.rbee("queen", "start")
    try:
        assert f"lists {name}: ready" in owner.rbee("hive", "install", name, "--yes")
        hives = {hive["hive"]: hive["state"] for hive in json.loads(owner.rbee("hive", "list", "--json"))}
        assert hives[name] == "ready"
        assert owner.rbee("infer", "-a", name, "--max-tokens", "5", "-p", "What is a hive?")
        owner.rbee("hive", "uninstall", name, "--yes")
    finally:
        owner.rbee("queen", "stop")
    assert tree(fresh_machine) == untouched
    assert fresh_machine.console("systemctl list-units --all --plain --no-legend 'rbee*'").stdout == ""
    assert "Nothing of rbee" in owner.rbee("hive", "uninstall", name, "--yes")


def test_forget_purges_a_machine_that_the_inventory_no_longer_names(
    fresh_machine: Machine, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").symlink_to(cache)
    owner = Operator(tmp_path, tmp_path / "inventory", fresh_machine)
    owner.write("Worker first model=rbee-demo")
    untouched = tree(fresh_machine)
    owner.rbee("apply", "--yes")
    fresh_machine.ssh(f"echo weights > {ROOT}/models/mine.gguf")
    key = f"Host *\n    IdentityFile {fresh_machine.key}\n    IdentitiesOnly yes\n"
    (owner.folder / "hives.conf").write_text(f"Host other\n    HostName 203.0.113.1\n{key}")

    assert "--purge" in owner.rbee("forget", fresh_machine.address, code=2)
    assert "--yes" in owner.rbee("forget", fresh_machine.address, "--purge", "--as-user", "root", code=2)
    assert fresh_machine.console("systemctl is-active rbee-worker@first").stdout.strip() == "active"
    assert f"{ROOT}/models stays" in owner.rbee("forget", fresh_machine.address, "--purge", "--as-user", "root", "-y")
    left = {line.split()[0] for line in tree(fresh_machine) - untouched}
    assert left == {"var/lib/rbee", "var/lib/rbee/models", "var/lib/rbee/models/mine.gguf"}
    assert (owner.folder / "known_hosts").read_text() == ""


def test_forget_of_a_machine_that_is_gone(fresh_machine: Machine, tmp_path: Path) -> None:
    owner = Operator(tmp_path, tmp_path / "inventory", fresh_machine)
    owner.write()
    fresh_machine.blackhole()
    assert "--offline" in owner.rbee("forget", fresh_machine.name, "--purge", "--yes", code=3)
    assert (owner.folder / "known_hosts").read_text() != ""
    said = owner.rbee("forget", fresh_machine.name, "--offline")
    assert "hives.conf:1 still names" in said
    assert (owner.folder / "known_hosts").read_text() == ""
