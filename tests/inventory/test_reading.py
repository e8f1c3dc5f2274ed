"""Reading a folder: which files, in which order, at which cost, and what a hostile one can do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from rbee.errors import InvalidInventory, NotFound
from rbee.inventory import read, world
from rbee.inventory.known_hosts import change, pins, without
from rbee.inventory.ssh_config import ssh_config_text, write_ssh_config
from rbee.inventory.world import this_machine

IGNORE = "IgnoreUnknown Hive*,Queen*,Worker*,Model*,Gpu*,Region*,Tags,Rbee*\n"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMssKcHg06P4IdScr7+eAXo4EA89rvPanbn4VNxXIe2b"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "b.conf", "Host *\n  User late\n")
    write(tmp_path / "a.conf", "Host box\n  User early\nHost other\n")
    write(tmp_path / ".hidden.conf", "Host hidden\n")
    write(tmp_path / "notes.txt", "Host notes\n")
    fleet = read(tmp_path)
    assert {host.name: host.user for host in fleet.hosts} == {"box": "early", "other": "late"}
    assert [file.name for file in fleet.files] == ["a.conf", "b.conf"]
    assert fleet.folder == tmp_path


def test_a_block_ends_with_its_file(tmp_path: Path) -> None:
    write(tmp_path / "a.conf", "Host box\n  User only-box\n")
    write(tmp_path / "b.conf", "Region everywhere\nHost other\n")
    assert {host.name: host.region for host in read(tmp_path).hosts} == {"box": "everywhere", "other": "everywhere"}


def test_a_copy_of_a_folder_is_the_same_fleet_and_a_change_is_another(tmp_path: Path) -> None:
    write(tmp_path / "one" / "a.conf", "Host box\n")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first = read(tmp_path / "one")
    assert read(tmp_path / "two").sha256 == first.sha256
    write(tmp_path / "two" / "a.conf", "Host box\n# more\n")
    assert read(tmp_path / "two").sha256 != first.sha256


def test_what_is_included_counts_too(tmp_path: Path) -> None:
    more = write(tmp_path / "more" / "x", "Host box\n")
    write(tmp_path / "a.conf", f"Include {more}\n")
    first = read(tmp_path)
    assert (first.files, first.included) == ([tmp_path / "a.conf"], [more])
    write(more, "Host box\n  User other\n")
    assert read(tmp_path).sha256 != first.sha256


def test_ssh_would_refuse_to_include_what_others_may_change(tmp_path: Path) -> None:
    more = write(tmp_path / "more" / "x", "Host box\n")
    write(tmp_path / "a.conf", f"Include {more}\n")
    more.chmod(0o664)
    with pytest.raises(InvalidInventory) as caught:
        read(tmp_path)
    assert caught.value.hint == f"chmod go-w {more}"


def test_neither_folder_nor_file_is_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read(tmp_path / "nowhere")
    with pytest.raises(InvalidInventory, match=r"has no \.conf file"):
        read(tmp_path)


@pytest.mark.skipif(os.getuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_a_mistake(tmp_path: Path) -> None:
    write(tmp_path / "a.conf", "Host box\n").chmod(0)
    with pytest.raises(InvalidInventory, match="Permission denied"):
        read(tmp_path)


def test_a_pipe_is_no_file_and_hangs_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.conf")
    with pytest.raises(InvalidInventory, match="no regular file"):
        read(tmp_path)


def test_files_without_end_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.conf").open("wb") as file:
        file.truncate(5 * 1024 * 1024)
    with pytest.raises(InvalidInventory, match="larger than"):
        read(tmp_path)


def test_files_that_multiply_are_refused(tmp_path: Path) -> None:
    for level in range(12):
        below = f"{tmp_path}/{level + 1}.inc"
        write(tmp_path / f"{level}.inc", f"Include {below} {below} {below}\n")
    write(tmp_path / "12.inc", "Host box\n")
    write(tmp_path / "a.conf", f"Include {tmp_path}/0.inc\n")
    with pytest.raises(InvalidInventory, match="more than 1000 files"):
        read(tmp_path)


def test_a_link_to_nothing_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    write(tmp_path / "a.conf", f"Include {tmp_path}/gone\n")
    with pytest.raises(InvalidInventory, match=r"cannot read .*gone: No such file"):
        read(tmp_path)


def test_a_mistake_for_all_hosts_is_told_of_once(tmp_path: Path) -> None:
    write(tmp_path / "a.conf", IGNORE + "Host h1 h2 h3\nHost *\n  Worker w model=none-such\n")
    with pytest.raises(InvalidInventory) as caught:
        read(tmp_path)
    assert [mistake.line for mistake in caught.value.mistakes] == [4]


def test_patterns_cannot_be_made_slow(tmp_path: Path) -> None:
    write(tmp_path / "a.conf", f"Host {'a' * 90}\nHost {'a*' * 200}b\n  User x\n")
    assert read(tmp_path).hosts[0].user != "x"


def test_a_command_runs_once_for_all_hosts_that_ask_for_it(tmp_path: Path) -> None:
    ran: list[str] = []

    def run(command: str) -> bool:
        ran.append(command)
        return True

    here = msgspec.structs.replace(this_machine(), run=run)
    write(
        tmp_path / "a.conf", IGNORE + 'Host a b c\nMatch exec "at home"\n  Tags x\nMatch exec "ping %n"\n  Region y\n'
    )
    fleet = read(tmp_path, here)
    assert sorted(ran) == ["at home", "ping a", "ping b", "ping c"]
    assert [host.tags for host in fleet.hosts] == [["x"]] * 3


def test_a_command_that_hangs_is_a_mistake_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "EXEC_TIMEOUT_S", 0.2)
    mark = tmp_path / "mark"
    write(tmp_path / "a.conf", f'Host a\nMatch exec "(sleep 600; touch {mark}) & wait"\n  User x\n')
    with pytest.raises(InvalidInventory, match="did not end in time"):
        read(tmp_path)
    running = [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if str(mark).encode() in _bytes(entry)]
    assert running == []


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_thousand_machines_take_about_as_long_as_a_thousand_times_one(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        lines = [f"Host h{number}\n  HostName 10.0.0.{number}\n  Worker w model=rbee-demo\n" for number in range(count)]
        write(tmp_path / "a.conf", IGNORE + "".join(lines))
        begin = time.process_time()
        assert len(read(tmp_path).hosts) == count
        return time.process_time() - begin

    seconds(50)
    # Ten times as many would take a hundred times as long if each looked at every block of the others.
    assert seconds(2000) < 40 * seconds(200)


def test_the_queen_can_read_inventories_cheaply() -> None:
    code = (
        "import sys; import rbee.inventory, rbee.inventory.resolve, rbee.inventory.ssh_config; "
        "print(*(name for name in ('click', 'rich', 'pyinfra', 'subprocess', 'difflib', 'asyncio', 'yaml', 'socket')"
        " if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_ssh_config_is_left_alone_when_nothing_changed(tmp_path: Path) -> None:
    write(tmp_path / "a.conf", "Host box\n")
    path = write_ssh_config(read(tmp_path))
    before = path.stat()
    assert write_ssh_config(read(tmp_path)).stat().st_ino == before.st_ino
    write(tmp_path / "a.conf", "Host other\n")
    assert "Host other" in write_ssh_config(read(tmp_path)).read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_ssh_config_ignores_what_the_persons_files_ignore(tmp_path: Path) -> None:
    home = tmp_path / "home"
    write(home / ".ssh" / "config", "IgnoreUnknown UseKeychain\n")
    write(tmp_path / "a.conf", "IgnoreUnknown Hive*,Mine\nHost box\n")
    here = msgspec.structs.replace(this_machine(), home=str(home))
    line = ssh_config_text(read(tmp_path, here), here).splitlines()[1]
    assert line == f"{IGNORE.strip()},Mine,UseKeychain"


def test_pins_made_at_once_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"

    def pin(number: int) -> None:
        change(path, lambda text: f"{text}host-{number} {KEY}\n")

    threads = [threading.Thread(target=pin, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(path.read_text().splitlines()) == 20


def test_forgetting_a_host_keeps_the_others_and_the_rules() -> None:
    text = f"# ours\nbox {KEY}\nother,box2 {KEY}\n@cert-authority * {KEY}\n@revoked box {KEY}\n"
    assert without(text, "box") == f"# ours\nother,box2 {KEY}\n@cert-authority * {KEY}\n@revoked box {KEY}\n"
    assert [pin.marker for pin in pins(text, "box")] == ["", "@cert-authority", "@revoked"]
    assert pins(text, "box")[0].fingerprint == "SHA256:KVvWmhKanvXyav6yrw5GCJdRd8AMp8TOfaHM5FbrtHc"
