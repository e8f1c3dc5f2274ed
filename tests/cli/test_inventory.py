"""`rbee inventory`, typed as a person types it, with the real ssh beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cli_rig import Person

IGNORE = "IgnoreUnknown Hive*,Queen*,Worker*,Model*,Gpu*,Region*,Tags,Rbee*\n"
FLEET = (
    IGNORE
    + """\
Host attic
    HostName 192.168.1.10
    QueenPort 7833
    Worker small model=rbee-demo gpu=cpu
Host gaming-pc
    HostName 192.168.1.100
    User vince
    Worker chat model=rbee-demo gpu=0 ctx=8192
Host *
    User rbee
    Region home
"""
)

needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is not installed")


@pytest.fixture
def author(person: Person) -> Person:
    """Someone whose ~ is as empty as the rest, with a fleet in ./inventory."""
    person.environment["HOME"] = str(person.home)
    write(person.folder / "inventory" / "fleet.conf", FLEET)
    return person


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)
    return path


def ssh_with(author: Person, config: str, host: str) -> dict[str, str]:
    done = subprocess.run(
        ["ssh", "-G", "-F", config, host], env=author.env(), capture_output=True, text=True, timeout=60, check=True
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


@needs_ssh
def test_a_good_inventory_is_said_to_be_good(author: Person) -> None:
    done = author.rbee("inventory", "check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "inventory: 2 machines, 2 workers: ok\n", "")


@needs_ssh
def test_the_example_that_ships_with_rbee_is_good(author: Person) -> None:
    example = Path(__file__).parents[2] / "inventory"
    done = author.rbee("inventory", "check", str(example))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_every_mistake_is_told_at_once_with_its_line(author: Person) -> None:
    write(author.folder / "inventory" / "more.conf", IGNORE + "Host x\n  HivePort 99999\n  Worker w model=rbee-dem\n")
    done = author.rbee("inventory", "check")
    assert done.returncode == 2
    assert "inventory/more.conf:3: HivePort: '99999' is no port from 1 to 65535" in done.stderr
    assert "inventory/more.conf:4: worker w of x: no Model line names 'rbee-dem'\n  try: model=rbee-demo" in done.stderr
    assert done.stderr.endswith("rbee: 2 mistakes in the inventory inventory\n")
    assert done.stdout == ""


def test_mistakes_as_json(author: Person) -> None:
    write(author.folder / "inventory" / "more.conf", IGNORE + "Host x\n  HivePort 99999\n")
    done = author.rbee("inventory", "check", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (2, False)
    assert [(m["file"], m["line"]) for m in found["mistakes"]] == [("inventory/more.conf", 3)]


def test_other_commands_tell_mistakes_too(author: Person) -> None:
    write(author.folder / "inventory" / "more.conf", "Host x\n  HivePort 99999\n")
    done = author.rbee("inventory", "show")
    assert done.returncode == 2
    assert done.stderr.startswith("rbee: inventory/more.conf:2: HivePort: '99999'")


@needs_ssh
def test_what_only_ssh_knows_to_be_wrong_is_found(author: Person) -> None:
    write(author.folder / "inventory" / "fleet.conf", FLEET.replace("User rbee", "StrictHostKeyChecking perhaps"))
    done = author.rbee("inventory", "check")
    assert done.returncode == 2
    assert 'inventory/fleet.conf:11: ssh refuses this: unsupported option "perhaps"' in done.stderr
    shown = author.rbee("inventory", "show", "attic", "--json")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("rbee: inventory/fleet.conf:11: ssh refuses this")


@needs_ssh
def test_the_first_file_of_a_person_works_and_gets_a_hint(author: Person) -> None:
    shutil.rmtree(author.folder / "inventory")
    text = "Host gaming-pc\n  HostName 192.168.1.100\n  User vince\n  HivePort 7835\n"
    # Under umask 002 every new file is writable for its group.
    write(author.home / "config" / "hives.conf", text).chmod(0o664)
    done = author.rbee("inventory", "check")
    assert done.returncode == 0, done.stderr
    assert "hives.conf:4: warning: rbee reads HivePort" in done.stderr
    assert "try: the file's first line: IgnoreUnknown Hive*" in done.stderr
    config = author.rbee("inventory", "ssh-config").stdout.strip()
    assert ssh_with(author, config, "gaming-pc")["hostname"] == "192.168.1.100"


@needs_ssh
def test_commands_are_not_run_when_told_not_to(author: Person) -> None:
    ran = author.folder / "ran"
    write(author.folder / "inventory" / "z.conf", IGNORE + f'Match exec "touch {ran}"\n  Tags x\n')
    assert author.rbee("inventory", "check", "--no-exec").returncode == 0
    assert not ran.exists()
    assert author.rbee("inventory", "check").returncode == 0
    assert ran.exists()


def test_a_model_file_that_is_not_there_is_a_mistake(author: Person) -> None:
    write(author.folder / "inventory" / "m.conf", IGNORE + "Host attic\n  Model big source=file:big.gguf\n")
    done = author.rbee("inventory", "check", "--no-exec")
    assert done.returncode == 2
    assert "inventory/m.conf:3: model big: there is no file" in done.stderr
    write(author.folder / "inventory" / "big.gguf", "")
    assert author.rbee("inventory", "check", "--no-exec").returncode == 0


@needs_ssh
def test_what_a_persons_own_file_adds_is_used_and_told(author: Person) -> None:
    write(author.home / ".ssh" / "config", "IgnoreUnknown UseKeychain\nUseKeychain yes\nHost attic\n  Port 2222\n"
          "Host *\n  IdentityFile ~/.ssh/mine\n")  # fmt: skip
    done = author.rbee("inventory", "check")
    assert done.returncode == 0, done.stderr
    assert "fleet.conf:2: warning: ssh takes Port 2222 for attic" in done.stderr
    config = author.rbee("inventory", "ssh-config").stdout.strip()
    assert ssh_with(author, config, "attic")["identityfile"] == "~/.ssh/mine"


@needs_ssh
def test_no_file_weakens_the_policy_for_host_keys(author: Person) -> None:
    weak = "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nUpdateHostKeys yes\n"
    write(author.folder / "inventory" / "0.conf", weak)
    write(author.home / ".ssh" / "config", weak)
    config = author.rbee("inventory", "ssh-config").stdout.strip()
    found = ssh_with(author, config, "attic")
    assert found["stricthostkeychecking"] in ("true", "yes")
    assert found["updatehostkeys"] in ("false", "no")
    assert found["userknownhostsfile"] == str(author.folder / "inventory" / "known_hosts")


@needs_ssh
def test_a_folder_with_an_odd_name_reaches_ssh_whole(author: Person) -> None:
    folder = author.folder / 'my %h "fleet" \\x'
    write(folder / "a.conf", FLEET)
    done = author.rbee("inventory", "ssh-config", "-i", str(folder))
    config = done.stdout.removesuffix("\n")
    assert Path(config) == folder / ".rbee" / "ssh_config"
    assert ssh_with(author, config, "attic")["hostname"] == "192.168.1.10"
    assert ssh_with(author, config, "attic")["userknownhostsfile"].endswith('my %h "fleet" \\x/known_hosts')


def test_ssh_config_keeps_what_it_writes_to_its_owner_and_out_of_git(author: Person) -> None:
    config = Path(author.folder / author.rbee("inventory", "ssh-config").stdout.strip())
    assert config.parent.stat().st_mode & 0o777 == 0o700
    assert (config.parent / ".gitignore").read_text() == "*\n"
    printed = author.rbee("inventory", "ssh-config", "--print").stdout
    assert printed == config.read_text()
    assert json.loads(author.rbee("inventory", "ssh-config", "--print", "--json").stdout) == {
        "path": None,
        "text": printed,
    }


def test_show_lists_the_machines(author: Person) -> None:
    lines = author.rbee("inventory", "show").stdout.splitlines()
    assert lines[0].split() == ["HOST", "ADDRESS", "QUEEN", "HIVE", "WORKERS", "REGION", "TAGS", "FROM"]
    assert lines[1].split()[:5] == ["attic", "rbee@192.168.1.10", "7833", "7835", "small"]
    assert lines[2].endswith("inventory/fleet.conf:6")


def test_show_says_where_each_value_comes_from(author: Person) -> None:
    rows = {line.split()[0]: line.split() for line in author.rbee("inventory", "show", "gaming-pc").stdout.splitlines()}
    assert rows["User"] == ["User", "vince", "inventory/fleet.conf:8"]
    assert rows["Region"] == ["Region", "home", "inventory/fleet.conf:12"]
    assert rows["HivePort"] == ["HivePort", "7835", "default"]
    assert rows["Worker"][1:] == ["chat", "model=rbee-demo", "gpu=0", "port=8001", "ctx=8192", "inventory/fleet.conf:9"]


@needs_ssh
def test_show_as_json_joins_what_ssh_and_rbee_say(author: Person) -> None:
    found = json.loads(author.rbee("inventory", "show", "gaming-pc", "--json").stdout)
    assert found["ssh"]["hostname"] == "192.168.1.100"
    assert found["ssh"]["user"] == found["rbee"]["user"] == "vince"
    assert found["rbee"]["workers"][0]["port"] == 8001
    assert found["rbee"]["origins"]["user"] == {"file": "inventory/fleet.conf", "line": 8}


def test_without_ssh_the_text_can_still_be_checked_and_shown(author: Person, tmp_path: Path) -> None:
    nothing = tmp_path / "empty"
    nothing.mkdir()
    done = author.rbee("inventory", "check", PATH=str(nothing))
    assert done.returncode == 0
    assert "warning: The program ssh is not installed" in done.stderr
    assert author.rbee("inventory", "show", "attic", PATH=str(nothing)).returncode == 0
    refused = author.rbee("inventory", "show", "attic", "--json", PATH=str(nothing))
    assert refused.returncode == 1
    assert refused.stderr.startswith("rbee: The program ssh is not installed\n  try: ")


def test_a_machine_that_is_not_there_is_named_with_the_nearest(author: Person) -> None:
    done = author.rbee("inventory", "show", "gaming-cp")
    assert done.returncode == 4
    assert "has no machine 'gaming-cp'\n  try: gaming-pc" in done.stderr


def test_no_inventory_is_said_plainly(author: Person) -> None:
    done = author.rbee("inventory", "check", "-i", "nowhere")
    assert (done.returncode, done.stderr.splitlines()[0]) == (4, "rbee: There is no inventory at nowhere")
    (author.folder / "empty").mkdir()
    done = author.rbee("inventory", "check", "empty")
    assert done.returncode == 2
    assert "empty: the folder has no .conf file" in done.stderr


def test_graph_draws_the_fleet(author: Person) -> None:
    assert author.rbee("inventory", "graph").stdout.splitlines() == [
        "queen attic  192.168.1.10:7833",
        "  host attic  rbee@192.168.1.10  hive :7835  home",
        "    worker small  rbee-demo  :8001  cpu",
        "  host gaming-pc  vince@192.168.1.100  hive :7835  home",
        "    worker chat  rbee-demo  :8001  gpu 0",
    ]
    tree = json.loads(author.rbee("inventory", "graph", "--json").stdout)
    assert [part["name"] for part in tree["parts"]] == ["attic", "gaming-pc"]


def test_graph_on_a_terminal_has_branches(author: Person) -> None:
    master, slave = os.openpty()
    done = subprocess.run(
        author.command("inventory", "graph"),
        stdin=slave, stdout=slave, stderr=subprocess.PIPE, cwd=author.folder,
        env=author.env(TERM="xterm", NO_COLOR="1", PYTHONIOENCODING="utf-8", COLUMNS="120"), timeout=120, check=False,
    )  # fmt: skip
    os.close(slave)
    shown = re.sub("\x1b\\[[0-9;]*m", "", os.read(master, 65536).decode())
    os.close(master)
    assert done.returncode == 0, done.stderr
    assert "├── host attic" in shown
    assert "└── worker chat" in shown


def test_graph_for_graphviz(author: Person) -> None:
    dot = author.rbee("inventory", "graph", "--dot").stdout
    assert dot.startswith("digraph fleet {")
    assert dot.count("->") == 4
    assert dot.count("[label=") == 5


def test_keywords_are_shown_with_their_keys(author: Person) -> None:
    assert "HivePort" in author.rbee("inventory", "keywords").stdout
    one = author.rbee("inventory", "keywords", "worker").stdout
    assert one.startswith("Worker NAME model=NAME")
    assert "start-limit" in one
    table = json.loads(author.rbee("inventory", "keywords", "--json").stdout)
    assert {"HivePort", "Worker", "RbeeGitops"} <= {entry["keyword"] for entry in table}
    done = author.rbee("inventory", "keywords", "Wroker")
    assert (done.returncode, done.stderr.splitlines()[1]) == (4, "  try: Worker")
