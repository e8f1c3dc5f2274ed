"""The inventory as tables: machines, the values of one with where each comes from, and the keywords."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from rbee.cli.terminal import size, table
from rbee.errors import NotFound
from rbee.inventory.fleet import Fleet, Host, ModelLine, WorkerLine
from rbee.inventory.keywords import BY_NAME, KEYWORDS, Keyword, nearest
from rbee.inventory.values import PORT_OR_NONE

Row = tuple[str, str, str]


def show_hosts(fleet: Fleet) -> None:
    """Print one line a machine."""
    table(
        ("host", "address", "queen", "hive", "workers", "region", "tags", "from"),
        (
            (
                host.name,
                address(host),
                host.queen_port or "",
                host.hive_port or "",
                ", ".join(worker.name for worker in host.workers),
                host.region,
                " ".join(host.tags),
                host.at,
            )
            for host in fleet.hosts
        ),
    )


def show_host(host: Host) -> None:
    """Print each value of a machine, and the line that it comes from."""
    table(("keyword", "value", "from"), _values(host))


def address(host: Host) -> str:
    """Return where ssh connects to."""
    return f"{host.user}@{host.hostname}" + (f":{host.port}" if host.port != 22 else "")


def _values(host: Host) -> Iterator[Row]:
    yield "Host", host.name, str(host.at)
    for name, value in (("HostName", host.hostname), ("User", host.user), ("Port", str(host.port))):
        yield name, value, _origin(host, name)
    for keyword in KEYWORDS:
        if not keyword.keys and keyword.name != "Gpu":
            value = getattr(host, keyword.field)
            yield keyword.name, " ".join(value) if keyword.many else _plain(keyword, value), _origin(host, keyword.name)
    for gpu in host.gpus:
        yield "Gpu", gpu, _origin(host, "Gpu")
    for model in host.models:
        yield "Model", describe_model(model), str(model.at)
    for worker in host.workers:
        yield "Worker", describe_worker(worker), str(worker.at)
    if host.gitops:
        yield "RbeeGitops", f"{host.gitops.repository} {host.gitops.branch} {host.gitops.path}", str(host.gitops.at)


def _plain(keyword: Keyword, value: object) -> str:
    return "none" if value == 0 and keyword.kind is PORT_OR_NONE else str(value)


def _origin(host: Host, keyword: str) -> str:
    return str(host.origins.get(keyword.lower(), "default"))


def describe_worker(worker: WorkerLine) -> str:
    """Return a worker in the words of its line, with its port."""
    parts = [worker.name, f"model={worker.model}"]
    if worker.backend:
        parts.append(f"backend={worker.backend}")
    if worker.device:
        parts.append(f"device={worker.device}")
    if worker.gpus:
        parts.append(f"gpu={','.join(str(gpu) for gpu in worker.gpus)}")
    numbers = (("port", worker.port), ("ctx", worker.context_tokens), ("slots", worker.slots),
               ("threads", worker.threads))  # fmt: skip
    parts += [f"{name}={value}" for name, value in numbers if value]
    times = (("idle", worker.idle_s), ("start-limit", worker.start_limit_s))
    parts += [f"{name}={value:g}s" for name, value in times if value]
    if worker.memory_bytes:
        parts.append(f"memory={size(worker.memory_bytes).replace(' ', '')}")
    if worker.url:
        parts.append(f"url={worker.url}")
    if worker.upstream_model:
        parts.append(f"upstream-model={worker.upstream_model}")
    if worker.capabilities:
        parts.append(f"capabilities={','.join(worker.capabilities)}")
    return " ".join([*parts, *(["pin=yes"] if worker.pin else []), *(f"{k}={v}" for k, v in worker.options.items())])


def describe_model(model: ModelLine) -> str:
    """Return a model in the words of its line."""
    return f"{model.name} source={model.source}" + (f" sha256={model.sha256[:12]}…" if model.sha256 else "")


def keyword_named(name: str) -> Keyword:
    """Return one of rbee's keywords. Raises: NotFound with the nearest one."""
    found = BY_NAME.get(name.lower())
    if found is None:
        near = nearest(name, [keyword.name for keyword in KEYWORDS])
        raise NotFound(f"{name!r} is no keyword of rbee's own", hint=near or "rbee inventory keywords; man ssh_config")
    return found


def show_keywords(keywords: Sequence[Keyword]) -> None:
    """Print one line a keyword."""
    table(
        ("keyword", "default", "what it says"),
        ((keyword.name, keyword.default, keyword.help.replace("`", "")) for keyword in keywords),
    )


def show_keyword(keyword: Keyword) -> None:
    """Print one keyword with its keys."""
    click.echo(f"{keyword.usage}\n\n  {keyword.help.replace('`', '')}\n\nFor example: {keyword.example}\n")
    if keyword.keys:
        table(
            ("key", "value", "what it says"),
            ((key.name, key.kind.usage, key.help.replace("`", "")) for key in keyword.keys),
        )
