"""Which lines apply to one host: OpenSSH's rules, of which the first is that the first value stays (ssh_config(5))."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from rbee.inventory.conditions import Condition, Known, expand, host_applies, match_applies
from rbee.inventory.fleet import At
from rbee.inventory.parse import Config, Line
from rbee.inventory.world import World


class Failure(Struct, frozen=True):
    """A block or value that cannot be evaluated, and why."""

    at: At
    message: str


class Evaluation(Struct):
    """All lines that apply to a host, by keyword in their order, and what ssh would connect to."""

    name: str
    hostname: str
    lines: dict[str, list[Line]]
    active: dict[int, bool]
    """Of each block, by the number of its condition, whether it applies to the name as it was given."""
    failures: list[Failure]

    def applies(self, block: Condition) -> bool:
        """Tell whether a block applies to this host by its name."""
        return self.active.get(block.number, False)

    def first(self, keyword: str) -> Line | None:
        """Return the line whose value stays."""
        return next(iter(self.lines.get(keyword, ())), None)

    def words(self, keyword: str) -> Sequence[str]:
        """Return the value that stays, or nothing."""
        line = self.first(keyword)
        return line.words if line else ()


def evaluate(config: Config, name: str, world: World) -> Evaluation:
    """Return what applies to a host; `Match exec` runs commands, as it does under ssh."""
    first = _Pass(config, world, name, name)
    evaluation = first.run(Evaluation(name, name.lower(), {}, first.active, []))
    evaluation.hostname = _hostname(evaluation).lower()
    if config.two_passes:
        # The second pass looks for the name that the first one led to (ssh_config(5), CanonicalizeHostname).
        _Pass(config, world, name, evaluation.hostname, final=True).run(evaluation)
    return evaluation


class _Pass:
    """One reading of all lines; `target` is the name that `Host` patterns are compared with."""

    def __init__(self, config: Config, world: World, name: str, target: str, *, final: bool = False) -> None:
        self.config = config
        self.world = world
        self.name = name
        self.target = target
        self.final = final
        self.active: dict[int, bool] = {-1: True}

    def run(self, evaluation: Evaluation) -> Evaluation:
        """Add the lines that apply; what an earlier pass added is not added again."""
        for condition, lines in self.config.sections_for(self.target):
            if not self._applies(condition, evaluation):
                continue
            for line in lines:
                kept = evaluation.lines.setdefault(line.keyword, [])
                if not self.final or not any(line is other for other in kept):
                    kept.append(line)
        return evaluation

    def _applies(self, number: int, evaluation: Evaluation) -> bool:
        """Tell whether a block applies, decided where it is first met: `Match host` sees what is set by then."""
        if number not in self.active:
            condition = self.config.conditions[number]
            active = self._applies(condition.parent, evaluation)
            if active and condition.criteria:
                active = self._match_applies(condition, evaluation)
            elif active:
                active = host_applies(condition, self.target)
            self.active[number] = active
        return self.active[number]

    def _match_applies(self, condition: Condition, evaluation: Evaluation) -> bool:
        try:
            return match_applies(condition, self._known(evaluation), self.world)
        except (ValueError, TimeoutError) as problem:
            message = str(problem) or "the command of Match exec did not end in time"
            evaluation.failures.append(Failure(condition.at, message))
            return False

    def _known(self, evaluation: Evaluation) -> Known:
        def value(keyword: str, default: str = "") -> str:
            return next(iter(evaluation.words(keyword)), default)

        return Known(
            name=self.name,
            target=self.target,
            hostname=evaluation.hostname if self.final else _hostname(evaluation),
            user=value("user", self.world.user),
            port=value("port", "22"),
            alias=value("hostkeyalias"),
            tag=value("tag"),
            final=self.final,
        )


def _hostname(evaluation: Evaluation) -> str:
    line = evaluation.first("hostname")
    if line is None or not line.words:
        return evaluation.name
    try:
        return expand(line.words[0], {"%": "%", "h": evaluation.name})
    except ValueError as problem:
        failure = Failure(line.at, str(problem))
        if failure not in evaluation.failures:
            evaluation.failures.append(failure)
        return evaluation.name
