"""The words of one line of rbee's own, as the value that it means."""

from __future__ import annotations

import os
from typing import Any

from rbee.inventory import values
from rbee.inventory.fleet import Gitops, ModelLine, WorkerLine
from rbee.inventory.keywords import Key, Keyword, nearest
from rbee.inventory.parse import Line

OF_SERVERS = ("url", "model", "key-file", "slots", "upstream-model", "capabilities")
"""The keys that a worker with a `url` may have."""


class Wrong(ValueError):
    """A value is wrong; `hint` says what to try."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def read_line(keyword: Keyword, line: Line, warn: list[str]) -> Any:
    """Return the value of a line; doubts are added to `warn`. Raises: Wrong."""
    try:
        if keyword.name == "Gpu":
            return _gpu(line)
        if keyword.many:
            return [keyword.kind.read(word) for words in line.words for word in words.split(",") if word]
        if not keyword.keys:
            return keyword.kind.read(_only(keyword, line))
        return {"Worker": _worker, "Model": _model, "RbeeGitops": _gitops}[keyword.name](keyword, line, warn)
    except Wrong:
        raise
    except ValueError as problem:
        raise Wrong(f"{keyword.name}: {problem}", f"for example: {keyword.example}") from None


def _only(keyword: Keyword, line: Line) -> str:
    if len(line.words) != 1:
        more = f"more than one value: {' '.join(line.words)}" if line.words else "no value"
        raise Wrong(f"{keyword.name} has {more}", f"for example: {keyword.example}")
    return line.words[0]


def _gpu(line: Line) -> str:
    """Return `INDEX [KIND [MEMORY]]` as it is written."""
    words = line.words
    if not 1 <= len(words) <= 3 or not words[0].isdecimal() or int(words[0]) > 255:
        raise Wrong("Gpu takes a number, a kind and a memory size", "for example: Gpu 0 cuda 24G")
    if len(words) > 1:
        values.WORD.read(words[1])
    if len(words) > 2:
        values.SIZE.read(words[2])
    return " ".join((str(int(words[0])), *words[1:]))


def _worker(keyword: Keyword, line: Line, warn: list[str]) -> WorkerLine:
    name, fields, options = _named(keyword, line)
    for option in options:
        near = nearest(option, [key.name for key in keyword.keys], 0.75)
        if near:
            warn.append(f"{option}= goes to the engine as an option of its own; {near}= is rbee's")
    gpus = fields.get("gpus")
    device = fields.get("device")
    if (gpus == [] and device not in (None, "cpu")) or (gpus and device == "cpu"):
        raise Wrong(f"worker {name} has a device= and a gpu= that contradict each other", "leave one of them out")
    if gpus == []:
        fields["device"] = "cpu"
    if fields.get("url"):
        ours = [key.name for key in keyword.keys if key.field in fields and key.name not in OF_SERVERS]
        if ours or options:
            raise Wrong(f"worker {name} has a url=, so {', '.join([*ours, *options])} means nothing",
                        "what runs there is set there")  # fmt: skip
    elif fields.get("key_file"):
        raise Wrong(f"worker {name} has a key-file= but no url=", "rbee makes the tokens of its own workers")
    for key, field in (("upstream-model", "upstream_model"), ("capabilities", "capabilities")):
        if field in fields and "url" not in fields:
            raise Wrong(f"worker {name} has {key}= but no url=", "rbee knows what its own workers have and can")
    if "key_file" in fields:
        fields["key_file"] = _absolute(fields["key_file"], line)
    return WorkerLine(name=name, at=line.at, options=options, **fields)


def _model(keyword: Keyword, line: Line, warn: list[str]) -> ModelLine:
    name, fields, _ = _named(keyword, line)
    if fields["source"].startswith("file:"):
        fields["source"] = "file:" + _absolute(fields["source"].removeprefix("file:"), line)
    return ModelLine(name=name, at=line.at, **fields)


def _gitops(keyword: Keyword, line: Line, warn: list[str]) -> Gitops:
    fields, _ = _keys(keyword, "RbeeGitops", line.words)
    path = fields.get("path", "inventory")
    if os.path.isabs(path) or ".." in path.split("/"):
        raise Wrong(f"RbeeGitops: path={path} leaves the repository", "a folder in it, such as path=inventory")
    if fields.get("interval_s", 60.0) < 1:
        raise Wrong("RbeeGitops: interval= is under a second", "interval=60s")
    if "key_file" in fields:
        fields["key_file"] = _absolute(fields["key_file"], line)
    return Gitops(at=line.at, **fields)


def _absolute(path: str, line: Line) -> str:
    """Return a path as seen from the folder of the file that names it."""
    folder = os.path.dirname(os.path.abspath(line.at.file))
    return os.path.normpath(os.path.join(folder, os.path.expanduser(path)))


def _named(keyword: Keyword, line: Line) -> tuple[str, dict[str, Any], dict[str, str]]:
    first, *rest = line.words or ("",)
    if not first or "=" in first:
        raise Wrong(f"{keyword.name} begins with a name", f"for example: {keyword.example}")
    name = keyword.kind.read(first)
    fields, options = _keys(keyword, f"{keyword.name.lower()} {name}", rest)
    return name, fields, options


def _keys(keyword: Keyword, what: str, words: list[str] | tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    known = {key.name: key for key in keyword.keys}
    fields: dict[str, Any] = {}
    options: dict[str, str] = {}
    for word in words:
        name, assigned, value = word.partition("=")
        if not assigned or not name:
            raise Wrong(f"{what}: {word!r} is no key=value", f"for example: {keyword.example}")
        key = known.get(name.lower())
        if (key.field in fields) if key else (name in options):
            raise Wrong(f"{what}: {name}= stands there twice", "leave one of them out")
        if key:
            fields[key.field] = _value(what, key, value)
        else:
            options[_option(keyword, what, name)] = value
    _demand(keyword, what, fields, options)
    return fields, options


def _value(what: str, key: Key, value: str) -> Any:
    try:
        return key.kind.read(value)
    except ValueError as problem:
        raise Wrong(f"{what}: {key.name}={problem}", f"{key.name}={key.kind.usage}") from None


def _option(keyword: Keyword, what: str, name: str) -> str:
    if not keyword.other_keys:
        near = nearest(name, [key.name for key in keyword.keys])
        listed = ", ".join(f"{key.name}=" for key in keyword.keys)
        raise Wrong(f"{what}: there is no {name}=", f"{near}=" if near else f"one of {listed}")
    return str(values.OPTION.read(name))


def _demand(keyword: Keyword, what: str, fields: dict[str, Any], options: dict[str, str]) -> None:
    for key in keyword.keys:
        if key.required and key.field not in fields:
            near = nearest(key.name, list(options))
            raise Wrong(
                f"{what} has no {key.name}=",
                f"{key.name}= in place of {near}=" if near else f"{key.name}={key.kind.usage}",
            )
