"""Boot test machines for a person, with an inventory that is ready to use, until Ctrl+C.

.venv-dev/bin/python tests/hosts/shell.py 2
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from machines import Machine, Rig, RigProblem, base_tree, started_rig, why_no_machines


def main(words: Sequence[str] | None = None) -> int:
    """Boot the machines, tell how to reach them, wait, and take them away."""
    ask = argparse.ArgumentParser(description="Boot test machines and write an inventory of them.")
    ask.add_argument("count", type=int, nargs="?", default=1, help="how many (default: 1)")
    ask.add_argument(
        "--user", default="root", choices=["root", "deploy", "walled"], help="who the inventory logs in as"
    )
    ask.add_argument(
        "--inventory", type=Path, help="folder to write hosts.conf into (default: one that goes with them)"
    )
    ask.add_argument("--line", action="append", default=[], help="a further line of each Host block; may be repeated")
    given = ask.parse_args(words)
    if reason := why_no_machines():
        print(reason, file=sys.stderr)
        return 1
    # A shell's background jobs begin with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        serve(given.count, given.inventory, given.line, given.user)
    except KeyboardInterrupt:
        return 0
    except RigProblem as problem:
        print(problem, file=sys.stderr)
    return 1


def serve(count: int, inventory: Path | None, lines: Sequence[str], user: str) -> NoReturn:
    """Have machines until a signal ends this."""
    base = base_tree(lambda line: print(line, file=sys.stderr, flush=True))
    with started_rig(base) as rig, rig.machines(count) as machines:
        folder = rig.write_inventory(inventory or rig.state / "inventory", machines, *lines, user=user)
        tell(rig, machines, folder)
        while True:
            # Not signal.pause(): a signal that comes just before it is heard only with the next one.
            time.sleep(1)


def tell(rig: Rig, machines: Sequence[Machine], folder: Path) -> None:
    """Say where everything is."""
    print(f"inventory  {folder}")
    for machine in machines:
        print(f"{machine.name:10} ssh -F {folder / 'hosts.conf'} {machine.name}   ({machine.address})")
        print(f"{'':10} unplug: nft and tc in `ip netns exec {machine.namespace}`; its disk: {machine.disk.root}")
    print(f"controller {rig.network.controller}")
    print("Ctrl+C takes them away.", flush=True)


if __name__ == "__main__":
    sys.exit(main())
