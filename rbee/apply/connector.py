"""The `@rbee` connector for pyinfra: hosts of an inventory, over the `ssh` binary.

pyinfra's own ssh connector reads ssh_config by itself, leaves `StrictHostKeyChecking` out, and may ask at a prompt.
Here ssh does all of that, and an agent that stays on the host for the run carries out rbee's own operations.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from io import IOBase
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pyinfra.api.exceptions import ConnectError
from pyinfra.connectors.base import BaseConnector
from pyinfra.connectors.util import CommandOutput, OutputLine, extract_control_arguments, make_unix_command_for_host

from rbee.apply.ssh import Session, Ssh
from rbee.errors import HostProblem
from rbee.inventory import read
from rbee.inventory.fleet import Host
from rbee.inventory.ssh_config import write_ssh_config

if TYPE_CHECKING:
    from pyinfra.api.command import StringCommand

COMMAND_LIMIT_S = 600
Event = Callable[[dict[str, Any]], None]
AHEAD: dict[str, Session] = {}
"""Agents that the engine started before it knew whether they would be needed."""
PREPARED: dict[str, dict[str, Any]] = {}
"""Hosts that the engine brings along, by name, with their data; others are read from an inventory folder."""


class RbeeConnector(BaseConnector):
    """Runs commands on one host of an rbee inventory."""

    handles_execution = True

    @staticmethod
    def make_names_data(name: str) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
        """Yield the hosts of `@rbee/INVENTORY` with their data; their tags and region are groups."""
        if name in PREPARED:
            yield name, PREPARED[name], []
            return
        fleet = read(Path(name))
        config = write_ssh_config(fleet)
        for host in fleet.hosts:
            groups = [*host.tags, host.region] if host.region else list(host.tags)
            yield host.name, {"rbee_host": host, "rbee_ssh": Ssh(config), "rbee_fleet": fleet}, groups

    def connect(self) -> None:
        """Start the agent. Raises: ConnectError."""
        host: Host = self.host.data.rbee_host
        self.ssh: Ssh = self.host.data.rbee_ssh
        self.session = AHEAD.pop(host.name) if host.name in AHEAD else Session(self.ssh, host)
        self.problem = ""
        self.event: Event = self.host.data.get("rbee_event") or _unheard
        try:
            self.session.ask("read", path="/etc/hostname")
        except HostProblem as problem:
            raise ConnectError(str(problem)) from None

    def disconnect(self) -> None:
        """End the agent."""
        self.session.close()

    def run_shell_command(
        self, command: StringCommand, print_output: bool = False, print_input: bool = False, **arguments: Any
    ) -> tuple[bool, CommandOutput]:
        """Run a command and return whether it succeeded, with its lines."""
        control = extract_control_arguments(arguments)  # type: ignore[arg-type]  # pyinfra's own dictionary
        arguments.setdefault("_sudo", self.host.data.rbee_host.user != "root")
        line = make_unix_command_for_host(self.state, self.host, command, **arguments).get_raw_value()
        given = control.get("_stdin")
        text = given if isinstance(given, str) else "\n".join(given) if given else ""
        done = subprocess.run(
            self.ssh.command(self.host.name, line.replace("sudo -H", "sudo -n -H", 1)),
            input=text.encode(),
            capture_output=True,
            timeout=control.get("_timeout") or COMMAND_LIMIT_S,
        )
        lines = [OutputLine("stdout", line) for line in done.stdout.decode("utf-8", "replace").splitlines()]
        lines += [OutputLine("stderr", line) for line in done.stderr.decode("utf-8", "replace").splitlines()]
        expected = control.get("_success_exit_codes") or [0]
        return done.returncode in expected, CommandOutput(lines)

    def put_file(
        self,
        filename_or_io: str | IOBase,
        remote_filename: str,
        remote_temp_filename: str | None = None,
        print_output: bool = False,
        print_input: bool = False,
        **arguments: Any,
    ) -> bool:
        """Send a file; a reader there sees the old one or the whole new one."""
        import hashlib
        import io

        data = Path(filename_or_io).read_bytes() if isinstance(filename_or_io, str) else _all(filename_or_io)
        digest = hashlib.sha256(data).hexdigest()
        self.session.put(remote_filename, io.BytesIO(data), len(data), digest, event=self.event)
        return True

    def get_file(
        self,
        remote_filename: str,
        filename_or_io: str | IOBase,
        remote_temp_filename: str | None = None,
        print_output: bool = False,
        print_input: bool = False,
        **arguments: Any,
    ) -> bool:
        """Fetch a file."""
        data = b"".join(self.session.chunks(remote_filename))
        if isinstance(filename_or_io, str):
            Path(filename_or_io).write_bytes(data)
        else:
            filename_or_io.write(data)
        return True

    def rsync(self, *_: Any, **__: Any) -> bool:
        """Not offered: files are few and go whole."""
        raise NotImplementedError("the @rbee connector has no rsync; use files.put")


def _all(file: IO[Any] | IOBase) -> bytes:
    data = file.read()
    return data.encode() if isinstance(data, str) else bytes(data)


def _unheard(event: dict[str, Any]) -> None:
    pass
