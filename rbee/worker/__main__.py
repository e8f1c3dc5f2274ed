"""`python -m rbee.worker run …` starts a worker; `plugins` lists the installed backends."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rbee import paths
from rbee.errors import InvalidModelFile, PortInUse, RbeeError
from rbee.lean import share_one_arena, without_typing_extensions
from rbee.lifeline import die_with_parent
from rbee.notify import Notifier, passed_socket

with without_typing_extensions():
    import msgspec

    from rbee.wire.fleet import WorkerReady, WorkerSpec, WorkerState
    from rbee.worker import backends, settings

if TYPE_CHECKING:
    from rbee.worker.app import App

DRAIN_S = 10.0
LAST_S = 10.0
ERRNO = {PortInUse: errno.EADDRINUSE, InvalidModelFile: errno.ENOEXEC}
"""What systemd is told of a failed start, beside its words (sd_notify(3))."""
FINISHED = b"f"
"""What is written to the pipe of signals when the worker ends by itself; a signal writes its number."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the worker's command line and return its exit code."""
    given = parser().parse_args(argv)
    try:
        if given.command == "plugins":
            return plugins(as_json=given.json)
        if given.settings:
            return run_declared(given.settings)
        return run(settings.read_spec(given.spec) if given.spec else settings.from_arguments(given))
    except RbeeError as problem:
        print(f"rbee worker: {problem}", file=sys.stderr)
        return problem.exit_code


def run_declared(file: Path) -> int:
    """Run the worker of a settings file, as systemd starts it; what hinders it is told to systemd as well."""
    from rbee.worker.unit import from_settings

    notifier, listener = Notifier.from_environment(), passed_socket()
    try:
        return run(from_settings(file), listener, notifier)
    except RbeeError as problem:
        notifier.send(f"STATUS=failed: {problem}", f"ERRNO={ERRNO.get(type(problem), errno.EINVAL)}")
        print(f"rbee worker: {problem}", file=sys.stderr)
        return 1


def run(
    spec: WorkerSpec,
    listener: socket.socket | None = None,
    notifier: Notifier = Notifier(),  # noqa: B008  frozen; nobody listens to it
) -> int:
    """Serve one model until a signal, a failed load or a dead engine; return the exit code.

    `listener` is a socket that listens already; without it the worker opens its own.
    """
    die_with_parent(spec.parent_pid, signal.SIGKILL)
    share_one_arena()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    from rbee.worker.app import App

    end_reader, end_writer = _signal_pipe()
    try:
        app = App(spec, backends.find(spec.backend)(), listener=listener, notifier=notifier)
    except RbeeError as problem:
        _announce_failure(spec, str(problem))
        raise
    app.start(on_end=lambda: os.write(end_writer, FINISHED))
    os.read(end_reader, 1)
    threading.Thread(target=_hurry, args=(app, end_reader), name="hurry", daemon=True).start()
    # An engine that hangs in native code must not keep a worker that was told to end.
    last = threading.Timer(DRAIN_S + LAST_S, os._exit, (1,))
    last.daemon = True
    last.start()
    app.pulse.stopping()
    app.end(DRAIN_S)
    if app.runner.status != "failed":
        return 0
    app.pulse.failed(app.runner.reason)
    print(f"rbee worker: {spec.backend} could not run {spec.model}: {app.runner.reason}", file=sys.stderr)
    return 1


def _signal_pipe() -> tuple[int, int]:
    """Return a pipe that every signal to end writes a byte to.

    A pipe, not an Event: a signal may come while the main thread holds the Event's own lock. The interpreter's
    wake-up descriptor writes it, not a handler: Linux may hand a signal to another thread while the main one, in
    which alone handlers run, sleeps on in a read.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return reader, writer


def _hurry(app: App, end_reader: int) -> None:
    """End the streams at once when a second signal comes while the worker drains."""
    while os.read(end_reader, 1) == FINISHED:
        pass
    app.runner.cut()


def plugins(*, as_json: bool) -> int:
    """Print what is installed; a broken plugin is a line of the list, never an error."""
    found = backends.report_all()
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
        return 0
    if not found:
        print("No worker plugin is installed. Try: pip install rbee-xllamacpp")
    for engine in found:
        print(f"{engine.name:18} {engine.version:12} {engine.summary}")
        print(f"{'':18} {'PROBLEM: ' + engine.problem if engine.problem else ', '.join(engine.capabilities)}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the worker's command line."""
    top = argparse.ArgumentParser(prog="rbee worker", description="One process, one engine, one model, OpenAI HTTP.")
    verbs = top.add_subparsers(dest="command", required=True)
    listing = verbs.add_parser("plugins", help="list the installed backends")
    listing.add_argument("--json", action="store_true", help="as JSON")
    start = verbs.add_parser("run", help="run a model", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    start.add_argument("--spec", type=Path, help="everything below from a JSON file (used by a hive)")
    start.add_argument("--settings", type=Path, help="everything below from a YAML file (used by systemd's unit)")
    start.add_argument("--backend", default="xllamacpp", help="the engine; see `plugins`")
    start.add_argument("--model", default="", help=f"a model file, or {paths.BUILT_IN_MODEL}")
    start.add_argument("--name", default="", help="the name that requests give as `model`")
    start.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    port_help = f"0 is any free one; the default is {settings.FIRST_PORT}, or the next free one"
    start.add_argument("--port", type=_port, default=argparse.SUPPRESS, help=port_help)
    start.add_argument("--ctx", type=_count, default=0, help="context in tokens; 0: what the model was trained for")
    start.add_argument("--slots", type=_count, default=0, help="jobs at once; 0: the engine's choice")
    start.add_argument("--threads", type=_count, default=0, help="threads; 0: the engine's choice")
    start.add_argument("--device", default="cpu", help="cpu, cuda, metal or rocm")
    start.add_argument("--gpu", default="", help="device numbers, such as 0,1")
    start.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an engine's own option")
    start.add_argument("--token-file", type=Path, help="a file with the bearer token that requests must carry")
    return top


def _announce_failure(spec: WorkerSpec, reason: str) -> None:
    if spec.hive_url:
        from rbee.worker.announce import announce

        failed = WorkerReady(name=spec.name, pid=os.getpid(), port=spec.port, state=WorkerState.FAILED, reason=reason)
        announce(spec, failed, threading.Event())


def _port(value: str) -> int:
    return _number(value, 65535)


def _count(value: str) -> int:
    return _number(value, 2**24)


def _number(value: str, limit: int) -> int:
    number = int(value) if value.isascii() and value.isdigit() else -1
    if not 0 <= number <= limit:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {limit}, not {value!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
