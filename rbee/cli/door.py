"""Which queen a command talks to: one given by address, or the one of this machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rbee.cli import local_queen
from rbee.cli.local_queen import Step
from rbee.client import Client
from rbee.errors import InvalidInput, TimedOut, Unreachable
from rbee.wire.fleet import HiveView

FIRST_REPORT_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Address:
    """Where a queen is, and the token that it takes from us."""

    url: str
    token: str
    local: bool


@dataclass(frozen=True)
class Door:
    """What `--queen` and `--api-key` say; without them the queen of this machine is meant."""

    url: str | None = None
    api_key: str = ""

    def running(self) -> Address:
        """Return the queen that runs. Raises: Unreachable when none does."""
        if self.url:
            return self._given(self.url)
        record = local_queen.find()
        if record is None:
            raise Unreachable("No queen is running", hint="rbee queen start")
        return Address(local_queen.url_of(record), record.token, local=True)

    def started(self, step: Step) -> Address:
        """Return the queen, after starting one when none runs on this machine. Raises: SetupProblem."""
        if self.url:
            return self._given(self.url)
        record = local_queen.ensure(step)
        return Address(local_queen.url_of(record), record.token, local=True)

    def started_again(self, gone: Address, step: Step) -> Address:
        """Return the queen after `gone` did not answer: the next one, once that one has ended.

        Raises: Unreachable when `gone` is no queen of this machine, or runs but does not answer.
        """
        if gone.local:
            local_queen.await_end(gone.url)
            return self.started(step)
        raise Unreachable(
            f"Nothing answers at {gone.url}", hint="is a queen running there? Its machine, port, firewall"
        )

    @contextlib.contextmanager
    def client(self, address: Address | None = None) -> Iterator[Client]:
        """Yield a client of a queen (without `address`: the running one)."""
        address = address or self.running()
        with contextlib.closing(Client(address.url, token=address.token)) as client:
            yield client

    def _given(self, url: str) -> Address:
        if not url.startswith(("http://", "https://")):
            raise InvalidInput(f"{url!r} is no address of a queen", hint="an address such as http://192.168.1.5:7833")
        return Address(url.rstrip("/").removesuffix("/v1"), self.api_key, local=False)


def hives(client: Client, step: Step = lambda text: None) -> list[HiveView]:
    """Return the machines, waiting for the first one that reports to a queen that has just started.

    Raises: TimedOut when none does.
    """
    deadline = time.monotonic() + FIRST_REPORT_TIMEOUT_S
    while not any(hive.last_report_s >= 0 for hive in _hives(client)):
        step("waiting for the hive")
        if time.monotonic() > deadline:
            raise TimedOut(
                f"No machine reported to the queen within {FIRST_REPORT_TIMEOUT_S:g} s", hint="rbee queen logs"
            )
        time.sleep(0.02)
    return _hives(client)


def _hives(client: Client) -> list[HiveView]:
    return client.get("/v1/hives", list[HiveView])


def only_hive(client: Client, step: Step = lambda text: None) -> str:
    """Return the name of the hive, where there is one. Raises: InvalidInput with their names, where there are more."""
    known = hives(client, step)
    if len(known) > 1:
        raise InvalidInput("There are several machines", hint=" or ".join(f"-a {hive.hive}" for hive in known))
    return known[0].hive
