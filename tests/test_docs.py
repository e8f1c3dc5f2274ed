"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rbee.queen.access import LOCAL
from rbee.queen.client_watch import ClientWatch
from rbee.queen.job import Job
from rbee.queen.places import Candidate
from rbee.queen.script import compile_script
from rbee.queen.view import Place, record
from rbee.wire.fleet import EngineReport, ModelReport
from rbee.wire.openai import REQUESTS, ChatRequest, Message

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_routing_page_names_every_field() -> None:
    page = (ROOT / "docs" / "routing.md").read_text()
    task, workers = page.split("`task`: ")[1].split("Each of `workers`")
    request = ChatRequest(model="m", messages=[Message(role="user", content="x")])
    job = Job("/v1/chat/completions", request, b"", LOCAL, ClientWatch(None))
    assert re.findall(r"`(\w+)`", task) == list(job.record())
    place = Candidate("h", ModelReport(name="m"), EngineReport(name="e"))
    assert re.findall(r"`(\w+)`", workers.split(". A place")[0]) == list(record(Place(place, None, None), "text-gen"))


def test_readme_names_every_endpoint() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in REQUESTS:
        assert f"`{path}`" in readme


def test_readme_script_compiles() -> None:
    [source] = re.findall(r"```rhai\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    compile_script(source, "README.md")


def test_the_first_two_blocks_of_the_readme_are_one_line_each() -> None:
    blocks = re.findall(r"^```\w*\n(.+?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert all(len(block.strip().splitlines()) == 1 for block in blocks[:2])
    assert blocks[0].strip().endswith('rbee infer -p "How do I add a machine?"')
    assert blocks[1].strip().endswith("pytest")
