"""Real test machines: Debian with systemd and sshd, booted in about a second, with no route to the internet.

    with started_rig(base_tree(print)) as rig, rig.machines(2) as (one, two):
        one.ssh("systemctl is-system-running")
        rig.write_inventory(folder, [one, two])
        two.power_off()

Each machine has its own network, processes, host key and disk (an overlay over one shared base tree, which a power
cut leaves as it is). They share the controller's kernel and clock, and systemd's limits on memory, tasks and devices
are not enforced inside.
"""

from __future__ import annotations

from . import faults
from .base_tree import base_tree, why_no_machines
from .commands import RigProblem, wait_until
from .machine import Machine
from .network import Direction
from .rig import Rig, started_rig

__all__ = [
    "Direction",
    "Machine",
    "Rig",
    "RigProblem",
    "base_tree",
    "faults",
    "started_rig",
    "wait_until",
    "why_no_machines",
]
