"""The machines' network: a switch that the controller is on too, one subnet, and no route to anywhere else.

The switch is a bridge in a network namespace of its own, out of reach of the controller's firewall: Docker's, for one,
drops what passes a bridge. On the controller there is one link only.

Faults of the link are nftables rules and a queueing discipline outside of the machine, which needs nothing for them.
"""

from __future__ import annotations

import ipaddress
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .commands import RigProblem, run, wait_until

Direction = Literal["both", "in", "out"]
NAMESPACES = Path("/run/netns")
TABLE = "inet rbee_fault"
# Addresses are still resolved (ARP): a machine that hangs is not one that nobody knows.
IP = "ether type { ip, ip6 }"


@dataclass(frozen=True)
class Network:
    """A switch with a subnet of its own; the controller has its first address."""

    switch: str
    subnet: ipaddress.IPv4Network

    @property
    def controller(self) -> str:
        """Return the controller's address on this network."""
        return str(self.subnet[1])

    def address(self, number: int) -> str:
        """Return the address of the machine with this number, counted from 1."""
        return str(self.subnet[2 + (number - 1) % 250])

    def attach(self, namespace: str, address: str) -> None:
        """Make a network namespace whose `eth0` is on the switch, and nothing else."""
        # A fixed hardware address: the neighbours' ARP caches stay right when a machine comes back.
        mac = "02:" + ":".join(f"{byte:02x}" for byte in b"\xbe" + ipaddress.IPv4Address(address).packed)
        run("ip", "netns", "add", namespace)
        plug(self.switch, namespace, namespace, "eth0", "address", mac)
        run("ip", "-n", namespace, "addr", "add", f"{address}/{self.subnet.prefixlen}", "dev", "eth0")
        run("ip", "-n", namespace, "link", "set", "lo", "up")
        run("ip", "-n", namespace, "link", "set", "eth0", "up")

    def drop(self, namespace: str, direction: Direction, peer: str, percent: int) -> None:
        """Lose packets on a machine's cable: `percent` of those to or from the address `peer` (or of all).

        Not on the machine: there the sender of a lost packet would be told.
        """
        chance = "" if percent >= 100 else f"numgen random mod 100 < {percent}"
        out = f'iifname "{namespace}" {f"ip daddr {peer}" if peer else IP} {chance} drop\n'
        into = f'oifname "{namespace}" {f"ip saddr {peer}" if peer else IP} {chance} drop\n'
        ways = {"out": out, "in": into, "both": out + into}
        rules(self.switch, f"bridge {namespace}", "type filter hook forward priority 0;\n" + ways[direction])

    def reset(self, namespace: str, port: int) -> None:
        """Answer each packet to a TCP port of a machine with a reset."""
        hook = "type filter hook input priority 0;\n"
        rules(namespace, TABLE, f"{hook}tcp dport {port} reject with tcp reset\n")

    def heal(self, namespace: str) -> None:
        """End every fault of a machine's link."""
        rules(self.switch, f"bridge {namespace}", "")
        rules(namespace, TABLE, "")
        limit_rate(namespace, 0)

    def detach(self, namespace: str) -> None:
        """Take a machine's namespace and its link away; no packet, not even a goodbye, leaves it after that."""
        if (NAMESPACES / namespace).exists():
            # First the link: the end of a namespace is the kernel's to choose, and the name must be free at once.
            if f'"{namespace}"' in run("ip", "-n", self.switch, "-json", "link", "show"):
                run("ip", "-n", self.switch, "link", "del", namespace)
            run("ip", "netns", "del", namespace)


def create(name: str) -> Network:
    """Make a switch with a free subnet of 10.99.0.0/16; its namespace and the controller's link have this name."""
    taken = [ipaddress.ip_network(route["dst"]) for route in routes() if route["dst"] != "default"]
    candidates = ipaddress.ip_network("10.99.0.0/16").subnets(new_prefix=24)
    subnet = next((net for net in candidates if not any(net.overlaps(other) for other in taken)), None)
    if not isinstance(subnet, ipaddress.IPv4Network):
        raise RigProblem("every subnet of 10.99.0.0/16 is in use on this machine")
    run("ip", "netns", "add", name)
    run("ip", "-n", name, "link", "add", "switch", "type", "bridge")
    run("ip", "-n", name, "link", "set", "switch", "up")
    plug(name, "controller", str(os.getpid()), name)
    run("ip", "addr", "add", f"{subnet[1]}/24", "dev", name)
    run("ip", "link", "set", name, "up")
    return Network(name, subnet)


def plug(switch: str, port: str, namespace: str, *end: str) -> None:
    """Lay a cable from a port of the switch to a namespace (or process), where its end has a name and settings."""
    cable = ["link", "add", port, "type", "veth", "peer", "name", *end, "netns", namespace]
    run("ip", "-n", switch, *cable)
    run("ip", "-n", switch, "link", "set", port, "master", "switch", "up")


def remove(namespace: str) -> None:
    """Take a namespace away with every link that ends in it."""
    if (NAMESPACES / namespace).exists():
        run("ip", "netns", "del", namespace)
    wait_until(lambda: not Path("/sys/class/net", namespace).exists(), f"the link {namespace} to be gone")


def routes() -> list[dict[str, str]]:
    """Return the controller's IPv4 routes, as `ip -json` tells them."""
    found: list[dict[str, str]] = json.loads(run("ip", "-4", "-json", "route", "show", "table", "main") or "[]")
    return found


def rules(namespace: str, table: str, chain: str) -> None:
    """Replace a table of fault rules; an empty chain means no fault."""
    # An `add` first makes the `delete` hold whether the table existed or not.
    text = f"add table {table}\ndelete table {table}\n" + (
        f"table {table} {{\nchain fault {{\n{chain}}}\n}}\n" if chain else ""
    )
    run("ip", "netns", "exec", namespace, "nft", "-f", "-", stdin=text)


def limit_rate(namespace: str, bits_per_s: int) -> None:
    """Slow down what a machine sends; zero takes the limit away."""
    settings = ["rate", f"{bits_per_s}bit", "burst", "32kb", "latency", "400ms"]
    if bits_per_s:
        run("ip", "netns", "exec", namespace, "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *settings)
    elif "tbf" in run("ip", "netns", "exec", namespace, "tc", "qdisc", "show", "dev", "eth0"):
        run("ip", "netns", "exec", namespace, "tc", "qdisc", "del", "dev", "eth0", "root")
