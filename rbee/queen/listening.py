"""Where the queen listens: at an address of her own, or at the socket that systemd kept of the process before her.

A kept socket listens on while no process runs: whoever connects meanwhile waits in the kernel, and is not refused
(`FileDescriptorStoreMax=`, systemd.service(5); sd_pid_notify_with_fds(3)).
"""

from __future__ import annotations

import socket

from rbee.errors import PortInUse, SetupProblem
from rbee.notify import Notifier, passed_socket

NAME = "http"


def kept_socket(host: str, port: int, service: Notifier) -> int | None:
    """Return the descriptor of the socket that systemd passed, if it listens here; one of another address is closed.

    Raises: SetupProblem.
    """
    passed = passed_socket()
    if passed is None:
        return None
    if passed.getsockname()[:2] in _addresses(host, port):
        return passed.detach()
    passed.close()
    service.forget(NAME)
    return None


def check_port(host: str, port: int) -> None:
    """Look before gunicorn does, which would try for five seconds and say so in its own words.

    Raises: PortInUse, SetupProblem.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as problem:
            if problem.errno == 98:
                raise PortInUse(host, port) from None
            raise SetupProblem(f"Cannot listen on {host}:{port} ({problem.strerror})") from None


def _addresses(host: str, port: int) -> set[tuple[object, object]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as problem:
        raise SetupProblem(f"Cannot listen on {host}:{port} ({problem.strerror})") from None
    return {(told[4][0], told[4][1]) for told in found}
