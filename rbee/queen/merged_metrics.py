"""Prometheus' page of a queen with several server processes: one, whichever of them is asked.

Counters and histograms are sums, and so is what is in flight or waits; of what each process believes of the fleet, the
highest counts, of what should be 1 the lowest. A sum that fell because a process died would look like a restart of
everything, and Prometheus' `rate` would count it all again. So each leaves its counters in a file before it tells them,
and the process that comes after it goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import falcon
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from rbee.queen.metrics_page import CONTENT_TYPE, metrics_page
from rbee.queen.peers import PROCESS, reach_of

if TYPE_CHECKING:
    from rbee.queen.app import Queen
    from rbee.queen.shared import Shared

SUMS = frozenset({
    "rbee_jobs_in_flight", "rbee_tenant_jobs_in_flight", "rbee_queue_jobs", "process_resident_memory_bytes",
    "process_virtual_memory_bytes", "process_open_fds",
})  # fmt: skip
LOWEST = frozenset({
    "rbee_shared_state_up", "rbee_records_available", "rbee_inventory_valid", "rbee_script_valid", "rbee_hive_up",
    "rbee_worker_up",
})  # fmt: skip
GROWING = frozenset({"counter", "histogram", "summary"})


@dataclass
class Family:
    """The series of one name: the comments above them, their type, and the value of each."""

    comments: list[str] = field(default_factory=list)
    kind: str = "untyped"
    samples: dict[str, float] = field(default_factory=dict)


class SharedGauges(Collector):
    """Whether the shared state is reached."""

    def __init__(self, sharing: Shared) -> None:
        self._sharing = sharing

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "rbee_shared_state_up",
            "0 while limits and queues are each process' own, because the shared state is away.",
            value=int(self._sharing.link.up),
        )


class MergedMetricsPage:
    """The page of all processes of this queen."""

    def __init__(self, queen: Queen, sharing: Shared, folder: Path) -> None:
        self._queen = queen
        self._sharing = sharing
        settings = queen.settings
        # A queen that starts anew counts from nothing.
        start = hashlib.sha256(settings.admin_token.encode()).hexdigest()
        self._path = folder / f"metrics-{settings.slot}.prom"
        self._mark = f"# {start}\n".encode()
        self._before = self._left()

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        caller = self._queen.access.reader(req.env)
        pages = [self._page(caller.tenant)]
        if reach_of(req.env) != PROCESS:
            peers = self._sharing.peers
            pages += peers.gather(peers.siblings(), "/metrics", caller)[0].values()
        resp.content_type = CONTENT_TYPE
        resp.data = merged(pages)

    def _page(self, tenant: str) -> bytes:
        """Return the page of this process and of those that had its slot before."""
        metrics, tenants = self._queen.metrics, self._queen.admission.tenants
        whole = merged([metrics_page(metrics, tenants), *self._before])
        self._leave(whole)
        if not tenant:
            return whole
        label = f'tenant="{tenant}"'
        own = [_only(page, lambda name: label in name) for page in self._before]
        return merged([metrics_page(metrics, tenants, tenant), *own])

    def _leave(self, page: bytes) -> None:
        data = self._mark + _only(page, lambda name: True)
        new = self._path.with_suffix(".new")
        # In the runtime folder, which is memory: nothing of this outlives the machine.
        with contextlib.suppress(OSError), open(new, "wb", opener=_private) as file:
            file.write(data)
            os.replace(new, self._path)

    def _left(self) -> list[bytes]:
        try:
            data = self._path.read_bytes()
        except OSError:
            return []
        return [data.removeprefix(self._mark)] if data.startswith(self._mark) else []


def merged(pages: Iterable[bytes]) -> bytes:
    """Return several pages in Prometheus' text format as one."""
    families: dict[str, Family] = {}
    for page in pages:
        _read(page.decode(), families)
    lines: list[str] = []
    for family in families.values():
        lines += family.comments
        lines += [f"{name} {_text(value)}" for name, value in family.samples.items()]
    return ("\n".join(lines) + "\n").encode()


def _read(page: str, families: dict[str, Family]) -> None:
    family, told = Family(), ""
    for line in page.splitlines():
        if line.startswith("# "):
            _, word, name, rest = (*line.split(" ", 3), "")[:4]
            if name != told:
                told, family = name, families.setdefault(name, Family())
            if word == "TYPE":
                family.kind = rest
            if line not in family.comments:
                family.comments.append(line)
        elif line:
            name, _, value = line.rpartition(" ")
            _add(family, told, name, float(value))


def _add(family: Family, of: str, name: str, value: float) -> None:
    old = family.samples.get(name)
    if old is None:
        family.samples[name] = value
    elif name.partition("{")[0].endswith("_created") or of in LOWEST:
        family.samples[name] = min(old, value)
    elif family.kind in GROWING or of in SUMS:
        family.samples[name] = old + value
    else:
        family.samples[name] = max(old, value)


def _only(page: bytes, wanted: Callable[[str], bool]) -> bytes:
    """Return the part of a page that only grows."""
    families: dict[str, Family] = {}
    _read(page.decode(), families)
    lines: list[str] = []
    for family in families.values():
        if family.kind in GROWING:
            lines += family.comments
            lines += [f"{name} {_text(value)}" for name, value in family.samples.items() if wanted(name)]
    return ("\n".join(lines) + "\n").encode()


def _text(value: float) -> str:
    return {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(repr(value), repr(value))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
