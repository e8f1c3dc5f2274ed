"""Reach hosts with the `ssh` binary, and run the agent there.

The binary, not a library: then ssh_config, agents, hardware keys, certificates and jumps work exactly as in a person's
own shell (ssh_config(5)). It never asks anything (`BatchMode`), and every wait has a bound.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import select
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from rbee.errors import HostBusy, HostFailed, HostRefused, HostUnreachable, SetupProblem
from rbee.inventory.fleet import Host
from rbee.paths import private

CONNECT_LIMIT_S = 5
ANSWER_LIMIT_S = 60.0
UNPACK_LIMIT_S = 300.0
ALIVE_EVERY_S, ALIVE_MISSES = 5, 2
KEY_VARIABLE = "RBEE_SSH_KEY"
"""Names a private key that is tried beside those of the inventory: where it is applied by a service."""
PERSIST_S = 60
OLDEST_PYTHON = (3, 11)
NO_PYTHON, NO_SUDO, OLD_PYTHON = 41, 42, 43
CHUNK = 1 << 20
AGENT = Path(__file__).with_name("agent.py")
Event = Callable[[dict[str, Any]], None]


def _silent(event: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Ssh:
    """How to reach the hosts of one inventory: its generated ssh_config and a folder for shared connections."""

    config: Path
    connect_limit_s: int = CONNECT_LIMIT_S
    sockets: Path = field(default_factory=lambda: socket_folder())
    user: str = ""
    """Who to log in as, whatever the configuration says."""

    def command(self, host: str, remote: str, *, tty: bool = False) -> list[str]:
        """Return the command line that runs `remote` on a host; the connection is shared and kept for a minute."""
        options = {
            "BatchMode": "yes",
            "ControlMaster": "auto",
            "ControlPath": f"{self.sockets}/%C",
            "ControlPersist": str(PERSIST_S),
            "ConnectTimeout": str(self.connect_limit_s),
            "ServerAliveInterval": str(ALIVE_EVERY_S),
            "ServerAliveCountMax": str(ALIVE_MISSES),
            "LogLevel": "ERROR",
        } | ({"User": self.user} if self.user else {})
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        key = os.environ.get(KEY_VARIABLE)
        words += ["-i", key] if key else []
        # `--` : a host's name is never an option.
        return ["ssh", "-F", str(self.config), *words, "-t" if tty else "-T", "--", host, *([remote] if remote else [])]

    def hang_up(self, host: str) -> None:
        """End the shared connection to a host, which would outlive a host key that is trusted no more."""
        line = ["ssh", "-F", str(self.config), "-o", f"ControlPath={self.sockets}/%C", "-O", "exit", "--", host]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(line, capture_output=True, timeout=ANSWER_LIMIT_S)

    def session(self, host: Host) -> Session:
        """Start the agent on a host. Raises: HostUnreachable, HostRefused when it is first asked."""
        return Session(self, host)


def socket_folder() -> Path:
    """Return a short folder of mode 0700 for the control sockets: their path must fit 104 bytes (unix(7))."""
    name = hashlib.sha256(os.environ.get("RBEE_HOME", "").encode()).hexdigest()[:6]
    folder = Path(tempfile.gettempdir()) / f"rbee-ssh-{os.getuid()}-{name}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise SetupProblem(f"{folder} belongs to another user", hint="remove it, or set TMPDIR")
    return private(folder)


def agent_command(python: str) -> str:
    """Return what a host's shell runs: the agent as root, its source coming on standard input."""
    size = AGENT.stat().st_size
    oldest = ".".join(map(str, OLDEST_PYTHON))
    program = (
        f"import sys;sys.version_info>={OLDEST_PYTHON} or (print('python '+sys.version.split()[0],file=sys.stderr),"
        f"sys.exit({OLD_PYTHON}));exec(compile(sys.stdin.buffer.read({size}),'rbee-agent','exec'))"
    )
    script = (
        f"command -v {shlex.quote(python)} >/dev/null 2>&1 || exit {NO_PYTHON}; s=; "
        f'[ "$(id -u)" = 0 ] || {{ command -v sudo >/dev/null 2>&1 || exit {NO_SUDO}; s="sudo -n"; }}; '
        f": needs python {oldest}; exec $s {shlex.quote(python)} -I -c {shlex.quote(program)}"
    )
    return f"/bin/sh -c {shlex.quote(script)}"


class Readable(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, none at the end."""


class Session:
    """The agent of one host, alive until it is closed. One thread uses it at a time."""

    def __init__(self, ssh: Ssh, host: Host) -> None:
        self.host = host
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the session
        try:
            self._process = subprocess.Popen(
                ssh.command(host.name, agent_command(host.python)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise SetupProblem("There is no ssh program here", hint="apt-get install openssh-client") from None
        assert self._process.stdin
        assert self._process.stdout
        self._input: IO[bytes] = self._process.stdin
        self._output = self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._buffer = b""
        self._connect_limit_s = ssh.connect_limit_s
        self._answered = False
        with contextlib.suppress(OSError):
            self._input.write(AGENT.read_bytes())

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, do: str, *, limit_s: float = ANSWER_LIMIT_S, event: Event = _silent, **order: Any) -> Any:
        """Give an order and return its answer; `event` hears what the host tells meanwhile.

        `limit_s` bounds the silence. Raises: HostUnreachable, HostRefused, HostBusy, HostFailed.
        """
        self._send(do, order)
        return self._answer(limit_s, event)

    def put(
        self, path: str, source: Readable, size: int, sha256: str, *, event: Event = _silent, mode: int = 0o644
    ) -> None:
        """Send a file, checked at the other end. Raises: HostUnreachable, HostFailed."""
        self._send("put", {"path": path, "size_bytes": size, "sha256": sha256, "mode": mode})
        done = 0
        try:
            while data := source.read(CHUNK):
                self._write(data, ANSWER_LIMIT_S)
                done += len(data)
                event({"event": "bytes", "done": done, "total": size})
        except OSError:
            raise self._lost() from None
        self._answer(ANSWER_LIMIT_S, event)

    def send(self, do: str, data: Iterable[bytes], size: int, *, event: Event = _silent, **order: Any) -> Any:
        """Give an order that `data` belongs to, and return its answer. Raises: HostUnreachable, HostFailed."""
        self._send(do, order)
        done = 0
        try:
            for piece in data:
                self._write(piece, ANSWER_LIMIT_S)
                done += len(piece)
                event({"event": "bytes", "done": min(done, size), "total": size})
        except BrokenPipeError:
            pass  # the answer says why; when the connection is gone there is none
        except OSError:
            raise self._lost() from None
        return self._answer(UNPACK_LIMIT_S, event)

    def chunks(self, path: str) -> Iterator[bytes]:
        """Yield a file of the host. Raises: HostUnreachable, HostFailed."""
        left = self.ask("get", path=path)["size_bytes"]
        while left:
            if not self._buffer:
                self._receive(time.monotonic() + ANSWER_LIMIT_S)
            data, self._buffer = self._buffer[:left], self._buffer[left:]
            left -= len(data)
            yield data
        self._answer(ANSWER_LIMIT_S, _silent)

    def close(self) -> None:
        """End the agent; it finishes a transaction that runs, by itself."""
        with contextlib.suppress(OSError):
            self._input.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()
        self._errors.close()

    def _send(self, do: str, order: dict[str, Any]) -> None:
        try:
            self._write(json.dumps({"do": do, **order}).encode() + b"\n", ANSWER_LIMIT_S)
        except OSError:
            raise self._lost() from None

    def _write(self, data: bytes, limit_s: float) -> None:
        """Write all of it; a host that takes nothing for `limit_s` is given up."""
        timer = threading.Timer(limit_s, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            self._input.write(data)
            self._input.flush()
        finally:
            timer.cancel()

    def _answer(self, limit_s: float, event: Event) -> Any:
        while True:
            line = json.loads(self._line(limit_s))
            self._answered = True
            if "event" in line:
                event(line)
            elif "ok" in line:
                return line["ok"]
            elif "busy" in line:
                raise HostBusy(self.host.name, line["busy"])
            elif "error" in line:
                raise HostFailed(self.host.name, line["error"], details=line)
            else:
                return line

    def _line(self, limit_s: float) -> bytes:
        deadline = time.monotonic() + limit_s
        if not self._answered:
            # ssh bounds its own connecting; a host that is connected and silent is bounded here.
            deadline = time.monotonic() + max(limit_s, self._connect_limit_s + 10)
        while b"\n" not in self._buffer:
            self._receive(deadline)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _receive(self, deadline: float) -> None:
        poller = select.poll()
        poller.register(self._output.fileno(), select.POLLIN)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            self._process.kill()
            raise HostUnreachable(self.host.name, "it stopped answering")
        data = self._output.read1(CHUNK)  # type: ignore[attr-defined]  # a BufferedReader
        if not data:
            raise self._lost()
        self._buffer += data

    def _lost(self) -> Exception:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2.0)
        self._errors.seek(0)
        words = self._errors.read().decode("utf-8", "replace")
        return explain(self.host, self._process.poll(), words)


REFUSALS = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed",
     "its host key is not the one that was pinned: somebody may be in between, or the machine was installed anew",
     "look at the machine itself; then: rbee hosts forget {host} && rbee hosts trust {host}"),
    (r"No .* host key is known|Host key verification failed",
     "its host key is not known", "rbee hosts trust {host}"),
    (r"Permission denied|Too many authentication failures|no mutual signature",
     "it does not accept this key or user ({words})", "rbee ssh {host}, and IdentityFile and User in {at}"),
    (r"a password is required|a terminal is required",
     "sudo asks for a password, and rbee never answers one",
     "give {user} NOPASSWD in sudoers, or User root in {at}"),
    (r"is not in the sudoers|may not run sudo|not allowed to execute", "{user} may not use sudo there", "User in {at}"),
    (r"Bad configuration option|Bad owner or permissions|keyword .* extra arguments|Unsupported option",
     "ssh does not accept the configuration ({words})", "rbee inventory check"),
)  # fmt: skip


def explain(host: Host, code: int | None, words: str) -> Exception:
    """Turn the end of an ssh process into an error that says what to try."""
    short = " ".join(words.split())[-300:]
    near = {"host": host.name, "at": host.origins.get("user", host.at), "user": host.user or "the user", "words": short}
    for pattern, message, hint in REFUSALS:
        if re.search(pattern, words):
            return HostRefused(host.name, message.format(**near), hint=hint.format(**near))
    if code == NO_PYTHON:
        return HostRefused(host.name, f"there is no {host.python}", hint="apt-get install python3, or RbeePython PATH")
    if code == OLD_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        return HostRefused(host.name, f"{host.python} is {short}; rbee needs {wanted} or later", hint="RbeePython PATH")
    if code == NO_SUDO:
        return HostRefused(host.name, f"{host.user} is not root, and there is no sudo", hint=f"User root in {host.at}")
    if code == 255 or code is None or code < 0:
        return HostUnreachable(host.name, short or "the connection was lost")
    return HostFailed(host.name, f"the agent ended with {code}: {short or 'no words'}")
