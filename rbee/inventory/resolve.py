"""From the lines of an inventory to its fleet: which hosts there are, and what each line means for them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from rbee.errors import Mistake
from rbee.inventory import checks, values
from rbee.inventory.conditions import Condition
from rbee.inventory.evaluate import Evaluation, evaluate
from rbee.inventory.fleet import At, Fleet, Host, WorkerLine
from rbee.inventory.keywords import BY_NAME, IGNORE_UNKNOWN, KEYWORDS, nearest_keyword
from rbee.inventory.lexing import in_list
from rbee.inventory.openssh_keywords import OPENSSH
from rbee.inventory.parse import EVERYWHERE, Config, Line
from rbee.inventory.reading import Wrong, read_line
from rbee.inventory.world import World

FIRST_WORKER_PORT = 8001
TRANSPORT = {"hostname": values.ADDRESS, "user": values.LOGIN, "port": values.PORT}
"""The keywords of ssh that the fleet needs to know itself."""
WRITTEN = {"hostname": "HostName", "user": "User", "port": "Port"}


class Resolver:
    """Reads each line once, then puts together every host; all mistakes are gathered in `mistakes`."""

    def __init__(self, config: Config, world: World) -> None:
        self.config = config
        self.world = world
        self.mistakes = list(config.mistakes)
        self.warnings = list(config.warnings)
        self._values: dict[int, Any] = {}
        self._told: set[tuple[str, int, str]] = set()

    def hosts(self) -> list[Host]:
        """Return the machines of the fleet, in the order in which their names first stand there."""
        self._read_lines()
        found = [host for name, blocks in self._names().items() if (host := self._host(name, blocks)) is not None]
        self.mistakes += checks.of_fleet(found)
        return found

    def _read_lines(self) -> None:
        self._warn_of_unknown()
        for line in self.config.lines:
            keyword = BY_NAME.get(line.keyword)
            doubts: list[str] = []
            try:
                if keyword:
                    self._values[id(line)] = read_line(keyword, line, doubts)
                elif line.keyword in TRANSPORT:
                    _check_transport(line)
            except Wrong as problem:
                self.mistakes.append(_mistake(line.at, str(problem), problem.hint))
            self.warnings += [_mistake(line.at, doubt) for doubt in doubts]

    def _warn_of_unknown(self) -> None:
        for top in self.config.tops:
            lines = [line for line in self.config.lines if line.top == top]
            unknown, covered = _unknown(lines)
            self.mistakes += [_unknown_keyword(line) for line in unknown]
            if covered is not None:
                self.warnings.append(covered)

    def _names(self) -> dict[str, list[Condition]]:
        found: dict[str, list[Condition]] = {}
        for name, condition in self.config.names():
            try:
                found.setdefault(values.HOST_NAME.read(name), []).append(condition)
            except ValueError as problem:
                hint = f"Host {' '.join(name.split(','))}" if "," in name else ""
                self.mistakes.append(_mistake(condition.at, f"Host: {problem}", hint))
        return found

    def _host(self, name: str, blocks: list[Condition]) -> Host | None:
        """Return a machine, or None when no block that spells its name out applies, or rbee runs nothing there."""
        evaluation = evaluate(self.config, name, self.world)
        for failure in evaluation.failures:
            self.mistakes.append(_mistake(failure.at, failure.message))
        at = next((block.at for block in blocks if evaluation.applies(block)), None)
        if at is None:
            return None
        host = self._assembled(evaluation, at)
        # A Model line that is wrong is one mistake; that workers name it is none.
        models = [line.words[0] for line in evaluation.lines.get("model", []) if line.words]
        for problem in checks.of_host(host, models):
            # A line under `Host *` that is wrong for all machines is told of for the first one.
            place = (problem.file, problem.line, problem.message.replace(name, ""))
            if place not in self._told:
                self._told.add(place)
                self.mistakes.append(problem)
        return host if host.is_member else None

    def _assembled(self, evaluation: Evaluation, at: At) -> Host:
        fields: dict[str, Any] = {}
        origins: dict[str, At] = {}
        for keyword in KEYWORDS:
            lines = [line for line in evaluation.lines.get(keyword.name.lower(), []) if id(line) in self._values]
            if lines:
                origins[keyword.name.lower()] = lines[0].at
                read = [self._values[id(line)] for line in lines]
                fields[keyword.field] = read if keyword.repeats else read[0]
        for name in TRANSPORT:
            if line := evaluation.first(name):
                origins[name] = line.at
        fields["gpus"] = _first_of_each(fields.get("gpus", []))
        host = Host(
            name=evaluation.name,
            at=at,
            hostname=self._hostname(evaluation),
            user=next(iter(evaluation.words("user")), self.world.user),
            port=_port(evaluation),
            origins=origins,
            **fields,
        )
        return replace(host, workers=_with_ports(host))

    def _hostname(self, evaluation: Evaluation) -> str:
        line = evaluation.first("hostname")
        try:
            values.ADDRESS.read(evaluation.hostname)
        except ValueError as problem:
            if line and "".join(line.words):
                self.mistakes.append(_mistake(line.at, f"HostName of {evaluation.name}: {problem}"))
        return evaluation.hostname


def in_order(found: Iterable[Mistake], config: Config) -> list[Mistake]:
    """Return mistakes in the order in which a person reads the files."""
    order = {text.path: place for place, text in reversed(list(enumerate(config.texts)))}
    # A file that is included twice says each of its mistakes twice.
    return sorted(dict.fromkeys(found), key=lambda mistake: (order.get(mistake.file, -1), mistake.line))


def fleet_of(config: Config, resolver: Resolver, folder: Path, sha256: str) -> Fleet:
    """Return the fleet of an inventory without mistakes."""
    included = list(dict.fromkeys(text.path for text in config.texts if text.path not in config.tops))
    hosts = resolver.hosts()
    return Fleet(
        folder=folder,
        files=[Path(top) for top in config.tops],
        included=[Path(path) for path in included],
        hosts=hosts,
        sha256=sha256,
        warnings=in_order(resolver.warnings, config),
    )


def _unknown(lines: list[Line]) -> tuple[list[Line], Mistake | None]:
    """Return the lines whose keyword nobody knows, and the warning for a file that ssh alone would refuse.

    Of several `IgnoreUnknown` the first stays, as of everything; one inside a block holds for some hosts only.
    """
    ignored: Line | None = None
    unknown, warning = [], None
    for line in lines:
        if line.keyword == "ignoreunknown" and ignored is None and line.condition == EVERYWHERE and line.words:
            ignored = line
        elif line.keyword in OPENSSH:
            continue
        ours = in_list(line.keyword, IGNORE_UNKNOWN.lower())
        covered = ignored is not None and in_list(line.keyword, ignored.words[0].lower())
        if line.keyword not in BY_NAME and line.keyword not in OPENSSH and (ours or not covered):
            unknown.append(line)
        elif line.keyword in BY_NAME and not covered and warning is None:
            warning = _not_ignored(line, ignored)
    return unknown, warning


def _not_ignored(line: Line, ignored: Line | None) -> Mistake:
    keyword = BY_NAME[line.keyword].name
    if ignored is None:
        hint = f"the file's first line: IgnoreUnknown {IGNORE_UNKNOWN}"
    else:
        hint = f"as line {ignored.at.line} of {ignored.at.file}: IgnoreUnknown {ignored.words[0]},{IGNORE_UNKNOWN}"
    return _mistake(line.at, f"rbee reads {keyword}, but ssh -F {line.top} would refuse it", hint)


def _unknown_keyword(line: Line) -> Mistake:
    hint = (
        nearest_keyword(line.keyword)
        or "remove it; another program's keyword is named in IgnoreUnknown at the top of the file"
    )
    return _mistake(line.at, f"neither rbee nor OpenSSH knows {line.keyword!r}", hint)


def _check_transport(line: Line) -> None:
    if len(line.words) != 1 or not line.words[0]:
        raise Wrong(f"{WRITTEN[line.keyword]} takes one value", "quotes around a value with spaces")
    if line.keyword != "hostname":
        try:
            TRANSPORT[line.keyword].read(line.words[0])
        except ValueError as problem:
            raise Wrong(f"{WRITTEN[line.keyword]}: {problem}") from None


def _port(evaluation: Evaluation) -> int:
    words = evaluation.words("port")
    return int(words[0]) if words and words[0].isdecimal() else 22


def _first_of_each(gpus: list[str]) -> list[str]:
    found: dict[str, str] = {}
    for gpu in gpus:
        found.setdefault(gpu.split()[0], gpu)
    return list(found.values())


def _with_ports(host: Host) -> list[WorkerLine]:
    """Give a port to each worker that names none: the first free one from 8001 on, in the order of the lines."""
    taken = {host.hive_port, host.queen_port, *(worker.port for worker in host.workers)}
    placed, port = [], FIRST_WORKER_PORT
    for worker in host.workers:
        if not worker.port and not worker.url:
            while port in taken:
                port += 1
            taken.add(port)
            worker = replace(worker, port=port)
        placed.append(worker)
    return placed


def _mistake(at: At, message: str, hint: str = "") -> Mistake:
    return Mistake(at.file, at.line, message, hint)
