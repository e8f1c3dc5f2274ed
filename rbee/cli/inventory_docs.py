"""Writes the table of docs/inventory.md from rbee's keywords: `python -m rbee.cli.inventory_docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rbee.inventory.keywords import IGNORE_UNKNOWN, KEYWORDS, Keyword

BEGIN, END = "<!-- keywords: begin -->\n", "<!-- keywords: end -->\n"


def render() -> str:
    """Return the part of the page between the two marks."""
    return "\n".join(_part()) + "\n"


def _part() -> Iterator[str]:
    yield "The first line of a file:\n"
    yield f"```\nIgnoreUnknown {IGNORE_UNKNOWN}\n```\n"
    yield "| keyword | default | what it says |\n|---|---|---|"
    for keyword in KEYWORDS:
        more = " Several lines add up." if keyword.repeats else ""
        yield f"| `{keyword.name}` | {_code(keyword.default)} | {keyword.help}{more} For example `{keyword.example}` |"
    for keyword in KEYWORDS:
        if keyword.keys:
            yield from _keys(keyword)


def _keys(keyword: Keyword) -> Iterator[str]:
    yield f"\n### {keyword.name}\n"
    yield "| key | value | what it says |\n|---|---|---|"
    for key in keyword.keys:
        needed = " Required." if key.required else ""
        yield f"| `{key.name}=` | {_code(key.kind.usage)} | {key.help}{needed} |"


def _code(text: str) -> str:
    escaped = text.replace("|", "\\|")
    return f"`{escaped}`" if text else ""


def renewed(page: str) -> str:
    """Return a page with the part between the marks made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{render()}{END}{after}"


if __name__ == "__main__":
    file = Path("docs/inventory.md")
    file.write_text(renewed(file.read_text()))
