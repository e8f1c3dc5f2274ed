"""What a host's services wrote: journalctl over ssh, line by line as it comes."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence

from rbee.apply.ssh import Ssh, explain
from rbee.errors import HostFailed, NotFound, SetupProblem
from rbee.inventory.fleet import Host

EVERY_UNIT = "rbee*"
LINE_BYTES = 1 << 20
"""A longer line is given in pieces."""


def units_of(host: Host, name: str | None) -> list[str]:
    """Return the units that `name` means: queen, hive, a worker, or without a name every one. Raises: NotFound."""
    if name is None:
        return [EVERY_UNIT]
    units = {"hive": "rbee-hive.service"} if host.hive_port else {}
    units |= {"queen": "rbee-queen.service"} if host.queen_port else {}
    units |= {worker.name: f"rbee-worker@{worker.name}.service" for worker in host.workers if not worker.url}
    if name not in units:
        raise NotFound(f"{host.name} has no {name!r} in {host.at.file}", hint=f"one of {', '.join(units)}")
    return [units[name]]


def journal(
    ssh: Ssh, host: Host, units: Sequence[str], *, lines: int, follow: bool = False, since: str = ""
) -> Iterator[str]:
    """Yield lines of the journal, as they come with `follow`. Raises: HostUnreachable, HostRefused, HostFailed."""
    words = ["journalctl", "--no-pager", "--quiet", "--output=short-iso", f"--lines={lines}"]
    words += [f"--unit={unit}" for unit in units]
    words += [f"--since={since}"] if since else []
    words += ["--follow"] if follow else []
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            ssh.command(host.name, as_root(words)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        assert process.stdout
        try:
            while line := process.stdout.readline(LINE_BYTES):
                yield line.decode("utf-8", "replace").rstrip("\n")
            process.wait()
        finally:
            # The far end ends when it writes to the closed connection, or hears that it is closed.
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace")
    if process.returncode == 0 or (process.returncode == 1 and not said.strip()):
        return  # journalctl ends with 1 when it has nothing to show
    if re.search(r"Failed to parse timestamp", said):
        raise HostFailed(host.name, f"--since {since!r} is no time", hint="--since '10 min ago', or '2026-01-31 12:00'")
    raise explain(host, process.returncode, said)


def as_root(words: Sequence[str]) -> str:
    """Return the command line that runs words as root on a host, without ever asking for a password."""
    script = f'cd /; s=; [ "$(id -u)" = 0 ] || s="sudo -n"; exec $s {shlex.join(words)}'
    return f"/bin/sh -c {shlex.quote(script)}"


def run_as_root(ssh: Ssh, host: Host, words: Sequence[str], *, limit_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command of a host to its end. Raises: HostUnreachable, HostRefused, HostFailed when it takes too long."""
    try:
        done = subprocess.run(
            ssh.command(host.name, as_root(words)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit_s,
        )
    except FileNotFoundError:
        raise SetupProblem("There is no ssh program here", hint="apt-get install openssh-client") from None
    except subprocess.TimeoutExpired:
        raise HostFailed(host.name, f"`{words[0]}` took longer than {limit_s:g} s there") from None
    out, said = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    if done.returncode == 255 or re.search(r"^sudo: ", said, re.MULTILINE):
        raise explain(host, done.returncode, said)
    return subprocess.CompletedProcess(words, done.returncode, out, said)
