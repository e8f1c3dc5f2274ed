"""What the lines of a host, and the hosts of a fleet, may not say together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rbee.errors import Mistake
from rbee.inventory.fleet import At, Host, WorkerLine
from rbee.inventory.keywords import nearest
from rbee.paths import BUILT_IN_MODEL

"""The model that every hive has without a file from anywhere."""


def of_host(host: Host, models: Sequence[str]) -> list[Mistake]:
    """Return what contradicts itself on one machine; `models` are all names that its `Model` lines give."""
    return [*_twice(host), *_unknown_models(host, models), *_ports(host), *_gpus(host), *_without(host)]


def of_fleet(hosts: Sequence[Host]) -> list[Mistake]:
    """Return what several machines cannot have at once."""
    return [*_queens(hosts), *_same_machine(hosts)]


def _twice(host: Host) -> Iterator[Mistake]:
    for what, lines in (("worker", host.workers), ("model", host.models)):
        seen: dict[str, At] = {}
        for line in lines:
            if line.name in seen:
                where = f"{what} {line.name} of {host.name} stands at {seen[line.name]} already"
                yield _at(line.at, where, "another name, or one line for both")
            seen.setdefault(line.name, line.at)


def _unknown_models(host: Host, models: Sequence[str]) -> Iterator[Mistake]:
    known = [BUILT_IN_MODEL, *models]
    for worker in host.workers:
        if worker.model not in known and not worker.url:
            near = nearest(worker.model, known)
            hint = f"model={near}" if near else f"a line: Model {worker.model} source=file:PATH"
            yield _at(worker.at, f"worker {worker.name} of {host.name}: no Model line names {worker.model!r}", hint)


def _ports(host: Host) -> Iterator[Mistake]:
    taken = {}
    if host.hive_port:
        taken[host.hive_port] = f"the hive (HivePort{_origin(host, 'hiveport')})"
    if host.queen_port and host.queen_port in taken:
        yield _at(host.origins["queenport"], f"port {host.queen_port} of {host.name} is {taken[host.queen_port]}",
                  "another QueenPort")  # fmt: skip
    elif host.queen_port:
        taken[host.queen_port] = f"the queen (QueenPort{_origin(host, 'queenport')})"
    for worker in host.workers:
        if worker.port > 65535:
            yield _at(worker.at, f"no port is left for worker {worker.name} of {host.name}", "port=NUMBER")
        elif worker.port in taken:
            yield _at(worker.at, f"port {worker.port} of {host.name} is {taken[worker.port]}", "another port=")
        if worker.port:
            taken.setdefault(worker.port, f"worker {worker.name} ({worker.at})")


def _origin(host: Host, keyword: str) -> str:
    return f", {host.origins[keyword]}" if keyword in host.origins else "'s default"


def _gpus(host: Host) -> Iterator[Mistake]:
    listed = {int(gpu.split()[0]) for gpu in host.gpus}
    for worker in host.workers:
        missing = [str(gpu) for gpu in worker.gpus if host.gpus and gpu not in listed]
        if missing:
            message = f"worker {worker.name}: no Gpu line of {host.name} lists GPU {' and '.join(missing)}"
            yield _at(worker.at, message, f"gpu={','.join(str(gpu) for gpu in sorted(listed))}")


def _without(host: Host) -> Iterator[Mistake]:
    ours: list[WorkerLine] = [worker for worker in host.workers if not worker.url]
    if ours and not host.hive_port:
        hint = "another HivePort, or leave the worker to another machine"
        yield _at(ours[0].at, f"worker {ours[0].name} needs a hive, but {host.name} has HivePort none", hint)
    if host.gitops and not host.queen_port:
        yield _at(
            host.gitops.at, f"RbeeGitops of {host.name} needs a queen there", "QueenPort 7833 on the same machine"
        )


def _queens(hosts: Sequence[Host]) -> Iterator[Mistake]:
    queens = [host for host in hosts if host.queen_port]
    for other in queens[1:]:
        message = (
            f"{queens[0].name} has a queen already ({queens[0].origins['queenport']}); {other.name} cannot have one"
        )
        yield _at(other.origins["queenport"], message, "QueenPort in the block of one machine")


def _same_machine(hosts: Sequence[Host]) -> Iterator[Mistake]:
    seen: dict[tuple[str, int], Host] = {}
    for host in hosts:
        first = seen.setdefault((host.hostname, host.hive_port), host)
        if first is not host and host.hive_port:
            message = f"{host.name} and {first.name} ({first.at}) are one machine, {host.hostname}"
            yield _at(host.at, message, "one name for it; short names for ssh belong into ~/.ssh/config")


def _at(at: At, message: str, hint: str = "") -> Mistake:
    return Mistake(at.file, at.line, message, hint)
