"""The table of keywords fits beside OpenSSH, and the pages that show it are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rbee.cli.inventory_docs import renewed
from rbee.inventory import read
from rbee.inventory.fleet import Gitops, Host, ModelLine, WorkerLine
from rbee.inventory.keywords import IGNORE_UNKNOWN, KEYWORDS, Keyword
from rbee.inventory.lexing import in_list
from rbee.inventory.openssh_keywords import OPENSSH
from rbee.inventory.world import World, this_machine

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "inventory.md").read_text()


def test_ignore_unknown_names_every_keyword_of_ours() -> None:
    assert [keyword.name for keyword in KEYWORDS if not in_list(keyword.name.lower(), IGNORE_UNKNOWN.lower())] == []


def test_ignore_unknown_hides_no_keyword_of_ssh() -> None:
    assert [name for name in sorted(OPENSSH) if in_list(name, IGNORE_UNKNOWN.lower())] == []


@pytest.mark.parametrize("keyword", KEYWORDS, ids=lambda keyword: keyword.name)
def test_what_a_keyword_says_has_a_place_in_the_fleet(keyword: Keyword) -> None:
    assert keyword.field in Host.__struct_fields__
    line = {"Worker": WorkerLine, "Model": ModelLine, "RbeeGitops": Gitops}.get(keyword.name)
    assert bool(keyword.keys) == (line is not None)
    if line is not None:
        assert [key.name for key in keyword.keys if key.field not in line.__struct_fields__] == []


@pytest.mark.parametrize("keyword", KEYWORDS, ids=lambda keyword: keyword.name)
def test_the_default_in_the_table_is_the_one_in_force(keyword: Keyword, tmp_path: Path) -> None:
    if keyword.default:
        plain = read(write(tmp_path / "a.conf", "Host box\n"))
        written = read(write(tmp_path / "b.conf", f"Host box\n  {keyword.name} {keyword.default}\n"))
        assert getattr(plain.hosts[0], keyword.field) == getattr(written.hosts[0], keyword.field)


@pytest.mark.parametrize("keyword", KEYWORDS, ids=lambda keyword: keyword.name)
def test_the_example_of_a_keyword_is_taken(keyword: Keyword, tmp_path: Path) -> None:
    model = "" if keyword.name == "Model" else "  Model qwen2.5-7b source=file:q.gguf\n"
    queen = "" if keyword.name == "QueenPort" else "  QueenPort 7833\n"
    file = write(tmp_path / "a.conf", f"Host box\n{model}{queen}  {keyword.example}\n")
    assert keyword.name.lower() in read(file).hosts[0].origins


def test_the_page_shows_the_table() -> None:
    assert renewed(PAGE) == PAGE, "python -m rbee.cli.inventory_docs writes it anew"


def test_the_inventories_on_the_page_are_good(tmp_path: Path) -> None:
    blocks = [block for block in re.findall(r"^```\n(.+?)^```", PAGE, re.DOTALL | re.MULTILINE) if "Host " in block]
    assert blocks
    for number, block in enumerate(blocks):
        assert read(write(tmp_path / f"{number}.conf", block)).hosts


def test_the_example_folder_is_good() -> None:
    fleet = read(ROOT / "inventory", quiet_world())
    assert [host.name for host in fleet.hosts] == ["attic", "gaming-pc"]
    assert fleet.warnings == []


def quiet_world() -> World:
    return this_machine(run_commands=False)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
