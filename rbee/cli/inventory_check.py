"""What `rbee inventory check` looks at: the text, the files that it names, and what ssh makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from rbee.cli.terminal import clean
from rbee.errors import InvalidInventory, Mistake, SetupProblem
from rbee.inventory import read
from rbee.inventory.fleet import At, Fleet, Host
from rbee.inventory.openssh import config_file, resolved
from rbee.inventory.resolve import WRITTEN
from rbee.inventory.world import this_machine


class Findings(msgspec.Struct, kw_only=True):
    """What is wrong and what is doubtful; `fleet` is None where the text itself is wrong."""

    path: Path
    mistakes: list[Mistake]
    warnings: list[Mistake]
    fleet: Fleet | None = None

    def as_data(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "ok": not self.mistakes,
            "inventory": str(self.path),
            "hosts": [host.name for host in self.fleet.hosts] if self.fleet else [],
            "sha256": self.fleet.sha256 if self.fleet else None,
            "mistakes": [mistake._asdict() for mistake in self.mistakes],
            "warnings": [warning._asdict() for warning in self.warnings],
        }

    def show(self) -> None:
        """Print mistakes as compilers do, to stderr, and a line that sums up."""
        for kind, found in (("", self.mistakes), ("warning: ", self.warnings)):
            for each in found:
                click.echo(clean(f"{each.at}: {kind}{each.message}"), err=True)
                if each.hint:
                    click.echo(clean(f"  try: {each.hint}"), err=True)
        if self.mistakes:
            click.echo(f"rbee: {_count(len(self.mistakes), 'mistake')} in the inventory {self.path}", err=True)
        elif self.fleet:
            workers = sum(len(host.workers) for host in self.fleet.hosts)
            machines = _count(len(self.fleet.hosts), "machine")
            click.echo(f"{self.path}: {machines}, {_count(workers, 'worker')}: ok")


def examine(path: Path, *, run_commands: bool) -> Findings:
    """Look at everything that can be looked at without a connection. Raises: NotFound."""
    try:
        fleet = read(path, this_machine(run_commands=run_commands))
    except InvalidInventory as problem:
        return Findings(path=path, mistakes=list(problem.mistakes), warnings=list(problem.warnings))
    found = Findings(path=path, mistakes=_missing_files(fleet), warnings=list(fleet.warnings), fleet=fleet)
    if not fleet.hosts:
        hint = "a block: Host NAME, and under it HostName ADDRESS"
        found.warnings.append(Mistake(str(path), 0, "no line names a machine", hint))
    # ssh has no way to leave the commands of Match exec alone.
    if run_commands:
        _ask_ssh(fleet, found)
    return found


def _missing_files(fleet: Fleet) -> list[Mistake]:
    found: dict[At, Mistake] = {}
    for host in fleet.hosts:
        for model in host.models:
            path = model.source.removeprefix("file:")
            if path != model.source and not Path(path).is_file():
                found[model.at] = Mistake(*_place(model.at), f"model {model.name}: there is no file {path}")
        for worker in host.workers:
            if worker.key_file and not Path(worker.key_file).is_file():
                found[worker.at] = Mistake(*_place(worker.at), f"worker {worker.name}: no file {worker.key_file}")
    return list(found.values())


def _ask_ssh(fleet: Fleet, found: Findings) -> None:
    try:
        with config_file(fleet) as config:
            said = resolved(config, [host.name for host in fleet.hosts])
    except InvalidInventory as problem:
        found.mistakes += problem.mistakes
        return
    except SetupProblem as problem:
        found.warnings.append(Mistake(str(found.path), 0, problem.message, problem.hint or ""))
        return
    for host in fleet.hosts:
        found.warnings += _differences(host, said[host.name])


def _differences(host: Host, said: dict[str, list[str]]) -> list[Mistake]:
    """Return where a file of the person's own decides; other machines, such as the queen's, do not have it."""
    ours = {"hostname": host.hostname, "user": host.user, "port": str(host.port)}
    return [
        Mistake(
            *_place(host.at),
            f"ssh takes {WRITTEN[key]} {said[key][0]} for {host.name} from ~/.ssh/config or /etc/ssh/ssh_config",
            f"{WRITTEN[key]} {said[key][0]} in the inventory: only you have that file",
        )
        for key, value in ours.items()
        if key in said and said[key][0] != value
    ]


def _place(at: At) -> tuple[str, int]:
    return at.file, at.line


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
