"""What attacks on a running queen are made of: raw sockets, keys of every kind, and a look at her process."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock
from urllib.parse import urlsplit

from falcon import inspect
from hostile_server import HostileServer
from queen_rig import FleetFolder

from rbee.queen.app import create_app
from rbee.queen.keys import ALPHABET, INFERENCE, PREFIX, KeyStore, _checksum
from rbee.queen.policy import NO_LIMITS, Policy
from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, processes_of, running_queen, until

CHAT = "/v1/chat/completions"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
OPEN = {("GET", "/health"), ("GET", "/openapi.json")}
"""What nobody needs a key for."""


@dataclass
class Told:
    """One answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return found


@dataclass
class Victim:
    """A running queen as an attacker sees her: an address that is not the loopback one, where there is such a one."""

    queen: RunningQueen
    host: str
    port: int
    away: dict[str, str]

    @contextlib.contextmanager
    def connected(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        with contextlib.closing(connection):
            yield connection

    def ask(self, method: str, path: str, value: Any = None, *, on: Any = None, **headers: str) -> Told:
        """Send one request from elsewhere. `value` is sent as JSON unless it is bytes."""
        with contextlib.ExitStack() as stack:
            connection = on or stack.enter_context(self.connected())
            body = value if isinstance(value, bytes) else json.dumps(value).encode() if value is not None else None
            told = {name.replace("_", "-"): text for name, text in headers.items()}
            connection.request(method, path, body, self.away | told)
            answer = connection.getresponse()
            return Told(answer.status, {n.lower(): v for n, v in answer.getheaders()}, answer.read())

    def key(self, name: str = "someone", **fields: Any) -> str:
        """Make a key and return its secret."""
        return self.store.create(name, **{"scopes": frozenset({INFERENCE}), "policy": NO_LIMITS, **fields})[1]

    def tenant(self, name: str) -> str:
        """Make a key of a tenant and return its secret."""
        return self.key(name, policy=Policy(tenant=name))

    @property
    def store(self) -> KeyStore:
        return KeyStore(self.queen.home / "state" / "keys.sqlite")

    def bad_keys(self) -> dict[str, dict[str, str]]:
        """Return headers that must not open anything, by what is wrong with them."""
        revoked = self.key("revoked")
        self.store.revoke(revoked.removeprefix(PREFIX)[:8])
        good = self.key("near")
        unknown = shaped("00000000" + "a" * 43)
        wrong = shaped(good.removeprefix(PREFIX)[:8] + "a" * 43)
        secrets = {
            "blank": "", "spaces": "   ", "wrong": "wrong", "unknown id": unknown, "wrong secret": wrong,
            "mistyped": good[:-1] + ("a" if good[-1] != "a" else "b"), "revoked": revoked,
            "expired": self.key("old", expires_at=time.time() - 1), "sql": "x' OR 1=1--", "not ASCII": "rbee_sk_é",
        }  # fmt: skip
        found = {what: {"Authorization": f"Bearer {secret}"} for what, secret in secrets.items()}
        return {"none": {}, "basic": {"Authorization": "Basic cmJlZTpyYmVl"}, "x-api-key": {"x-api-key": "no"}, **found}


def shaped(body: str) -> str:
    """Return what has the form of a key, with its checksum."""
    assert set(body) <= set(ALPHABET)
    return PREFIX + body + _checksum(body)


@contextlib.contextmanager
def victim(*arguments: str, **options: Any) -> Iterator[Victim]:
    """Run a queen that listens everywhere."""
    with running_queen("--host", "0.0.0.0", "--no-hive", *arguments, **options) as queen:
        port = urlsplit(queen.url).port or 0
        address = own_address()
        away = {} if address else {"X-Forwarded-For": "192.0.2.7"}
        yield Victim(queen, address or "127.0.0.1", port, away)


@contextlib.contextmanager
def serving(fleet: FleetFolder, *arguments: str, **options: Any) -> Iterator[tuple[Victim, RunningServer]]:
    """Run a queen with one server of the model honey."""
    with running_server(**options) as server:
        fleet.write(desk=["HivePort none", f"Worker says model=honey url={server.url}"])
        with victim("--inventory", str(fleet.folder), *arguments) as found:
            until(lambda: b"honey" in found.queen.client.send("GET", "/v1/models").read(), "the server to be ready")
            yield found, server


@contextlib.contextmanager
def beside(folder: FleetFolder, server: HostileServer, *more: str, key: str = "") -> Iterator[Victim]:
    """Run a queen whose only server is a hostile one."""
    if key:
        (folder.folder / "key").write_text(key)
    option = f" key-file={folder.folder / 'key'}" if key else ""
    folder.write(desk=["HivePort none", f"Worker says model=honey url={server.url}{option}", *more])
    with victim("--inventory", str(folder.folder)) as found:
        names = [line.split("model=")[1].split()[0] for line in ("model=honey", *more)]
        until(lambda: all(name in models(found) for name in names), "the servers to be ready")
        yield found


def models(found: Victim) -> str:
    return found.queen.client.send("GET", "/v1/models").read().decode()


def routes() -> dict[str, set[str]]:
    """Return every route of the application, with the methods that it takes."""
    app = create_app(MagicMock(sharing=None))  # only its routes are looked at
    found = inspect.inspect_compiled_router(app._router)
    assert len(found) > 30
    return {route.path: {one.method for one in route.methods if not one.internal} - {"OPTIONS"} for route in found}


def filled(path: str, value: str = "x") -> str:
    """Return a path with something in the place of each parameter."""
    return "/".join(value if part.startswith("{") else part for part in path.split("/"))


def chat(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    """Return a chat with the model honey, unless `fields` name another."""
    return {"model": "honey", "messages": [{"role": "user", "content": text}], **fields}


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def raw(queen: RunningQueen, data: bytes) -> bytes:
    """Send bytes, and return all that comes back until the connection ends."""
    with dialled(queen) as sock:
        answer = b""
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        with contextlib.suppress(ConnectionError):
            while came := sock.recv(65536):
                answer += came
        return answer


@contextlib.contextmanager
def dialled(queen: RunningQueen) -> Iterator[socket.socket]:
    parts = urlsplit(queen.url)
    with socket.create_connection(("127.0.0.1", parts.port or 0), timeout=60) as sock:
        yield sock


def server_process(queen: RunningQueen) -> int:
    """Return the process that serves."""
    [pid] = [pid for pid, line in processes_of(queen.home) if "rbee.queen" in line and pid != queen.record.pid]
    return pid


def memory_bytes(pid: int, what: str = "VmRSS") -> int:
    """Return what a process holds (VmRSS), or has held at most (VmHWM). See proc(5)."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{what}:"))


def own_address() -> str | None:
    """Return an address of this machine that is not the loopback one, if it has any."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: connecting a datagram socket only asks the routing table.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return None if address.startswith("127.") else address
