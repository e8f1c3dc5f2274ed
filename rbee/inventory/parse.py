"""The text of inventory files as lines, each with its words, its place and the block that it stands in."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from rbee.errors import Mistake
from rbee.inventory.conditions import Condition, read_match
from rbee.inventory.fleet import At
from rbee.inventory.lexing import is_literal, split_line, split_words
from rbee.inventory.world import World

MAX_DEPTH = 16
"""How deep files may include each other (readconf.c)."""
MAX_BYTES = 4 * 1024 * 1024
"""Of one file, and of all that are included."""
MAX_FILES = 1000
EVERYWHERE = 0
"""The number of the condition that a file begins with, outside of any block."""


class Line(Struct, frozen=True):
    """A keyword, lower-case, with its words; `condition` is the number of its block, `top` the file named to read."""

    keyword: str
    words: tuple[str, ...]
    at: At
    condition: int
    top: str


class Text(Struct, frozen=True):
    """A file that was read."""

    path: str
    data: bytes


class Config:
    """Everything that a list of files and what they include say, in the order in which ssh would read it."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.sections: list[tuple[int, list[Line]]] = []
        """The same lines by stretches of one block, each with the number of its condition."""
        self.conditions = [Condition(EVERYWHERE, -1, At("", 0), ("*",))]
        self.texts: list[Text] = []
        self.tops: list[str] = []
        """The files that were asked for; all others are included by them."""
        self.mistakes: list[Mistake] = []
        self.warnings: list[Mistake] = []
        self.two_passes = False
        """Whether `Match final` makes ssh read everything twice."""
        self._by_name: dict[str, list[int]] = {}
        self._others: list[int] = []

    def add(self, line: Line) -> None:
        """Append a line to the stretch of its block."""
        self.lines.append(line)
        if not self.sections or self.sections[-1][0] != line.condition:
            self.open(line.condition)
        self.sections[-1][1].append(line)

    def open(self, number: int) -> None:
        """Begin a stretch of a block."""
        patterns = self.conditions[number].patterns
        plain = bool(patterns) and all(is_literal(name) and not name.startswith("!") for name in patterns)
        indexes = [self._by_name.setdefault(name, []) for name in set(patterns)] if plain else [self._others]
        for index in indexes:
            index.append(len(self.sections))
        self.sections.append((number, []))

    def sections_for(self, target: str) -> list[tuple[int, list[Line]]]:
        """Return the stretches that may apply to a name: all but `Host` blocks that spell out other names only.

        So a thousand hosts take a thousand times as long as one, not a million times.
        """
        return [self.sections[place] for place in sorted([*self._others, *self._by_name.get(target, ())])]

    def names(self) -> list[tuple[str, Condition]]:
        """Return every name that a `Host` line spells out, with its line."""
        return [
            (name, found)
            for found in self.conditions
            for name in found.patterns
            if is_literal(name) and not name.startswith("!")
        ]


def parse(files: Iterable[Path], world: World) -> Config:
    """Read files one after the other, each beginning outside of any block; mistakes are collected, never raised."""
    reader = _Reader(world, Config())
    for file in files:
        reader.top = str(file)
        reader.config.tops.append(reader.top)
        reader.read(str(file), EVERYWHERE, ())
    return reader.config


class _Reader:
    def __init__(self, world: World, config: Config) -> None:
        self.world = world
        self.config = config
        self.top = ""

    def read(self, path: str, condition: int, within: tuple[At, ...]) -> None:
        """Read a file; `within` are the lines whose `Include` led to it."""
        try:
            data = _bytes_of(path)
        except (OSError, ValueError) as problem:
            at = within[-1] if within else At(path, 0)
            self._mistake(at, f"cannot read {path}: {getattr(problem, 'strerror', None) or problem}")
            return
        self.config.texts.append(Text(path, data))
        around = condition
        for number, text in enumerate(data.decode(errors="replace").split("\n"), 1):
            at = At(path, number)
            try:
                found = _keyword_and_words(text)
                if found is None:
                    continue
                keyword, words = found
                if keyword in ("host", "match"):
                    condition = self._block(keyword, words, at, around)
                elif keyword == "include":
                    self._include(words, at, condition, within)
                else:
                    self.config.add(Line(keyword, tuple(words), at, condition, self.top))
            except ValueError as problem:
                self._mistake(at, str(problem), _HINTS.get(str(problem), ""))

    def _block(self, keyword: str, words: list[str], at: At, parent: int) -> int:
        if "" in words:
            raise ValueError(f"{keyword.capitalize()} has an empty word")
        number = len(self.config.conditions)
        patterns = tuple(words) if keyword == "host" else ()
        # A block that is wrong applies to nothing, so that its lines do not fall into the block before.
        self.config.conditions.append(Condition(number, parent, at, patterns))
        if keyword == "match":
            try:
                criteria = read_match(words)
                self.config.conditions[number] = Condition(number, parent, at, (), criteria)
                self.config.two_passes |= any(criterion.name == "final" for criterion in criteria)
            except ValueError as problem:
                self._mistake(at, str(problem))
        # Also a block without lines is decided in its turn: it may name a host.
        self.config.open(number)
        return number

    def _include(self, words: list[str], at: At, condition: int, within: tuple[At, ...]) -> None:
        for word in words:
            if not word:
                raise ValueError("Include has an empty word")
            found = self._files(word)
            if not found:
                self._explain_nothing(word, at)
            for path in found:
                if self._may_include(path, at, within):
                    self.read(path, condition, (*within, at))

    def _files(self, pattern: str) -> list[str]:
        return sorted(glob.glob(self._anchored(pattern)))

    def _anchored(self, pattern: str) -> str:
        if pattern.startswith("~/"):
            return self.world.home + pattern[1:]
        if pattern.startswith("~"):
            return os.path.expanduser(pattern)
        return pattern if os.path.isabs(pattern) else f"{self.world.home}/.ssh/{pattern}"

    def _explain_nothing(self, pattern: str, at: At) -> None:
        # ssh passes over it in silence, and a machine is missing.
        hint = ""
        if not os.path.isabs(pattern) and not pattern.startswith("~"):
            beside = os.path.join(os.path.dirname(os.path.abspath(at.file)), pattern)
            hint = "OpenSSH looks for a relative path in ~/.ssh, not beside this file"
            if glob.glob(beside):
                hint += f"; write: Include {beside}"
        self.config.warnings.append(Mistake(at.file, at.line, f"Include {pattern} finds no file", hint))

    def _may_include(self, path: str, at: At, within: tuple[At, ...]) -> bool:
        """Tell whether ssh would include a file; where it would not, that is a mistake."""
        mistakes = len(self.config.mistakes)
        texts = self.config.texts
        if os.path.realpath(path) in [os.path.realpath(place.file) for place in (at, *within)]:
            self._mistake(at, f"{path} includes itself", "each file may be included from above only")
        elif len(within) >= MAX_DEPTH:
            self._mistake(at, f"files include each other more than {MAX_DEPTH} deep")
        elif len(texts) >= MAX_FILES or sum(len(text.data) for text in texts) > MAX_BYTES:
            self._mistake(at, f"more than {MAX_FILES} files or {MAX_BYTES} bytes are included")
        elif os.path.exists(path):
            self._look_at_rights(path, at)
        return len(self.config.mistakes) == mistakes

    def _look_at_rights(self, path: str, at: At) -> None:
        found = os.stat(path)
        if found.st_uid not in (0, self.world.user_id):
            self._mistake(
                at, f"ssh refuses to include {path}, which is another user's", f"chown {self.world.user} {path}"
            )
        elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            self._mistake(at, f"ssh refuses to include {path}, which others may change", f"chmod go-w {path}")

    def _mistake(self, at: At, message: str, hint: str = "") -> None:
        self.config.mistakes.append(Mistake(at.file, at.line, message, hint))


BYTE_ORDER_MARK = "the file begins with a byte-order mark, which ssh takes for part of a keyword"
_HINTS = {
    "a quote is not closed": 'a second " on the same line, or \\" for a quote that is meant as such',
    BYTE_ORDER_MARK: "save it as UTF-8 without one",
}


def _keyword_and_words(text: str) -> tuple[str, list[str]] | None:
    if text.startswith("\ufeff"):
        raise ValueError(BYTE_ORDER_MARK)
    if "\0" in text:
        raise ValueError("the line holds a NUL byte: this is no text file")
    found = split_line(text)
    return (found[0], split_words(found[1])) if found else None


def _bytes_of(path: str) -> bytes:
    # A pipe or a device would never end.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES} bytes")
    return data
