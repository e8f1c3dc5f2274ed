"""What a service and systemd tell each other: readiness, proofs of life, sockets (sd_notify(3), sd_listen_fds(3))."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass

FIRST_PASSED_FD = 3


@dataclass(frozen=True)
class Notifier:
    """Where systemd listens (empty: it does not), and within which time it wants a `WATCHDOG=1` (0: never)."""

    address: str = ""
    watchdog_s: float = 0.0

    @classmethod
    def from_environment(cls) -> Notifier:
        """Take what systemd told this process; the variables are removed, so that no child speaks in its name."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        limit, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        mine = pid in ("", str(os.getpid())) and limit.isascii() and limit.isdigit()
        return cls(address if address[:1] in ("/", "@") else "", int(limit) / 1_000_000 if mine else 0.0)

    def send(self, *assignments: str) -> None:
        """Send `NAME=value` assignments in one datagram; when systemd is away, do nothing."""
        with contextlib.suppress(OSError), self._connected() as sender:
            sender.sendall("\n".join(one.replace("\n", " ") for one in assignments).encode("utf-8", "replace"))

    def keep(self, name: str, listener: socket.socket) -> None:
        """Have systemd keep a listening socket for the next process of this unit (`FileDescriptorStoreMax=`).

        Whoever connects while none runs waits in the kernel, and is not refused.
        """
        self._send_kept(b"FDSTORE=1\nFDNAME=" + name.encode(), [listener.fileno()])

    def forget(self, name: str) -> None:
        """Have systemd close what it keeps under this name."""
        self._send_kept(b"FDSTOREREMOVE=1\nFDNAME=" + name.encode(), [])

    def _send_kept(self, message: bytes, descriptors: list[int]) -> None:
        with contextlib.suppress(OSError), self._connected() as sender:
            socket.send_fds(sender, [message], descriptors)

    def _connected(self) -> socket.socket:
        """Return a socket to systemd. Raises: OSError."""
        if not self.address:
            raise FileNotFoundError
        # An "@" stands for the zero byte of an abstract socket (unix(7)).
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sender.settimeout(1.0)
        try:
            sender.connect(address)
        except OSError:
            sender.close()
            raise
        return sender


def passed_socket() -> socket.socket | None:
    """Take the listening socket that systemd opened for this process, or None when there is none.

    The variables that announce it are removed, so that no child takes it for its own.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit() or int(count) < 1:
        return None
    os.set_inheritable(FIRST_PASSED_FD, False)
    return socket.socket(fileno=FIRST_PASSED_FD)
