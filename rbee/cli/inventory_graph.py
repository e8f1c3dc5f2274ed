"""The fleet as a tree: for a terminal, as plain lines, and for Graphviz."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from rbee.cli.inventory_tables import address
from rbee.cli.terminal import clean
from rbee.inventory.fleet import Fleet, Host, WorkerLine

if TYPE_CHECKING:
    from rich.tree import Tree


class Node(msgspec.Struct, frozen=True):
    """One thing of the fleet, and what belongs to it."""

    kind: str
    name: str
    about: str
    parts: list[Node] = []

    @property
    def label(self) -> str:
        """The node in one line."""
        return clean(f"{self.kind} {self.name}" + (f"  {self.about}" if self.about else ""))


def tree(fleet: Fleet) -> Node:
    """Return the fleet: its queen, and under her the machines with their workers."""
    hosts = [_host(host) for host in fleet.hosts]
    queens = fleet.queens
    if queens:
        return Node("queen", queens[0].name, f"{queens[0].hostname}:{queens[0].queen_port}", hosts)
    return Node("queen", "here", "on this machine, rbee queen start", hosts)


def _host(host: Host) -> Node:
    gpus = [Node("gpu", gpu, "") for gpu in host.gpus]
    hive = f"hive :{host.hive_port}" if host.hive_port else "no hive"
    about = [address(host), hive, host.region, *host.tags]
    return Node("host", host.name, "  ".join(word for word in about if word), gpus + [_worker(w) for w in host.workers])


def _worker(worker: WorkerLine) -> Node:
    where = worker.device or "any device"
    if worker.gpus:
        where = f"{worker.device or 'gpu'} {','.join(str(gpu) for gpu in worker.gpus)}"
    place = worker.url or f":{worker.port}  {where}"
    return Node("worker", worker.name, f"{worker.model}  {place}")


def lines(node: Node, depth: int = 0) -> Iterator[str]:
    """Yield the tree as lines, two spaces deeper for each level."""
    yield "  " * depth + node.label
    for part in node.parts:
        yield from lines(part, depth + 1)


def draw(node: Node) -> None:
    """Draw the tree on a terminal."""
    from rbee.cli.terminal import console

    console().print(_rich(node))


def _rich(node: Node) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    colour = {"queen": "yellow", "host": "cyan", "worker": "green"}.get(node.kind, "dim")
    label = Text.assemble((f"{node.kind} ", "dim"), (clean(node.name), colour), f"  {clean(node.about)}")
    grown = Tree(label, guide_style="dim")
    for part in node.parts:
        grown.add(_rich(part))
    return grown


def dot(node: Node) -> str:
    """Return the tree in Graphviz's language."""
    out = ["digraph fleet {", "  rankdir=LR;", "  node [shape=box];"]
    numbers = iter(range(10**6))

    def add(each: Node) -> int:
        number = next(numbers)
        label = each.label.replace("\\", "\\\\").replace('"', '\\"').replace("  ", "\\n")
        out.append(f'  n{number} [label="{label}"];')
        for part in each.parts:
            below = add(part)
            out.append(f"  n{number} -> n{below};")
        return number

    add(node)
    return "\n".join([*out, "}"])
