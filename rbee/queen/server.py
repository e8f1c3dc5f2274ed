"""The queen's processes: gunicorn's master, which also keeps this machine's hive, and the server process.

master ─┬─ server process (gevent, Falcon)
        └─ hive ── workers

The master does nothing but this, so it survives what may happen to a server process, and a server process that is
replaced costs no loaded model.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gevent
from gevent import monkey
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter

from rbee import __version__, logs, paths
from rbee.errors import RbeeError, SetupProblem
from rbee.lifeline import die_with_parent
from rbee.notify import Notifier
from rbee.queen import slots
from rbee.queen.arguments import parse, settings_of
from rbee.queen.connections import MAX_CONNECTIONS, Connections
from rbee.queen.hive_process import HiveProcess
from rbee.queen.jwt_tokens import read_jwt_settings
from rbee.queen.listening import NAME, check_port, kept_socket
from rbee.queen.log_sources import GunicornLog
from rbee.queen.receiving import receive_from_workers
from rbee.queen.settings import Settings
from rbee.wire.fleet import QueenRecord

log = logging.getLogger("rbee.queen")

RECORD = "queen.json"
EPHEMERAL_PREFIX = "rbee-ephemeral-"
REFUSING = 64
"""Connections beyond the limit that are told so at the same time; further ones wait to be accepted."""
DESCRIPTORS = 4 * MAX_CONNECTIONS
OTHER_DESCRIPTORS = 128
LAST_REQUEST_S = 1.0
"""How long an idle connection is left open for a next request, which is the last, by a process that is to end."""
LAST_ANSWERS_S = 4.0
"""How long before its end a process stops to listen at the latest: streams are cut 2 s before it."""


def main() -> None:
    """Run the queen in this process until it is told to stop."""
    master_pid = os.getpid()
    arguments = parse(sys.argv[1:])
    # Until gunicorn listens to signals, one must unwind the stack, so that an ephemeral home does not stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    die_with_parent(arguments.parent, signal.SIGTERM)
    try:
        run(settings_of(arguments))
    except RbeeError as problem:
        print(f"rbee: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
    finally:
        # A server process leaves through here as well: it was forked.
        if arguments.ephemeral and os.getpid() == master_pid:
            _remove_home()


def run(settings: Settings) -> None:
    """Listen, keep a hive, serve. Returns by SystemExit. Raises: PortInUse, SetupProblem."""
    assert monkey.is_module_patched("ssl"), "gevent must patch before anything else is imported"
    service = Notifier.from_environment()
    listener = kept_socket(settings.host, settings.port, service)
    if listener is None:
        check_port(settings.host, settings.port)
    read_jwt_settings(settings.jwt_path)  # what is wrong with it is said here, before there is a server process
    if settings.traced:
        check_tracing()
    logs.configure(settings.log_format)
    QueenArbiter(QueenApplication(settings, listener), service).run()


def check_tracing() -> None:
    """Look for the packages that traces need, without importing them. Raises: SetupProblem."""
    with contextlib.suppress(ModuleNotFoundError):
        if find_spec("opentelemetry.exporter.otlp.proto.http"):
            return
    raise SetupProblem("Traces need OpenTelemetry, which is not installed here", hint="pip install 'rbee[otel]'")


class QueenApplication(BaseApplication):
    """Tells gunicorn how to run, and makes the application in the server process.

    `listener` is the descriptor of a socket that listens already.
    """

    def __init__(self, settings: Settings, listener: int | None = None) -> None:
        self.settings = settings
        self._listener = listener
        self.from_peers: socket.socket | None = None
        self._boots = os.pipe()
        for end in self._boots:
            os.set_blocking(end, False)
        super().__init__()

    def load_config(self) -> None:
        settings = self.settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        values = {
            "bind": f"{host}:{settings.port}" if self._listener is None else f"fd://{self._listener}",
            "workers": settings.processes,
            "worker_class": ServerProcess,
            "worker_connections": MAX_CONNECTIONS + REFUSING,
            "timeout": 30,
            "graceful_timeout": round(settings.drain_s),
            "keepalive": 75,
            "worker_tmp_dir": "/dev/shm" if os.path.isdir("/dev/shm") else None,
            "control_socket_disable": True,
            "forwarded_allow_ips": "",
            "limit_request_line": 4094,
            "limit_request_fields": 64,
            "loglevel": "warning",
            "logger_class": GunicornLog,
            "proc_name": "rbee-queen",
            "post_worker_init": self.booted,
        }
        for name, value in values.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """Make the application. Called in the server process, after the fork."""
        from rbee.queen.app import create_app, create_queen, follow_fleet

        receive_from_workers()

        settings = self._in_slot() if self.settings.shared else self.settings
        queen = create_queen(settings, draining_since=ServerProcess.draining_since)
        follow_fleet(queen)
        return create_app(queen)

    def _in_slot(self) -> Settings:
        """Take a free slot, and listen to the other processes there. Raises: SystemExit; gunicorn then tries again."""
        settings = self.settings
        try:
            slot = slots.take(settings.state_dir / "slots", settings.processes)
        except slots.NoSlot:
            log.error("an earlier server process has not ended; this one ends")
            sys.exit(1)
        self.from_peers = slots.listen(slots.socket_path(settings.state_dir, slot))
        return replace(settings, slot=slot, max_in_flight=max(1, settings.max_in_flight // settings.processes))

    def booted(self, process: Any) -> None:
        """Tell the master that this server process answers. gunicorn calls it there."""
        os.write(self._boots[1], b".")
        # It wakes the master, which looks whether a child has ended, and else would look once a second.
        os.kill(process.ppid, signal.SIGCHLD)

    def has_booted(self) -> bool:
        """Return True in the master, once, when a server process has come to answer."""
        try:
            return bool(os.read(self._boots[0], 4096))
        except BlockingIOError:
            return False


class QueenArbiter(Arbiter):
    """gunicorn's master, with a hive beside the server process.

    The hive is started from this process' only thread: the kernel ties a child's parent-death signal to the thread.
    """

    def __init__(self, app: QueenApplication, service: Notifier) -> None:
        self._application = app
        self._hive: HiveProcess | None = None
        # gunicorn says that it is ready when it listens, before anything can answer; its children are not the service.
        self._service = service
        super().__init__(app)

    def start(self) -> None:
        super().start()
        # gunicorn makes it inheritable for its re-exec; a hive that held it too would keep the port after the queen.
        for listener in self.LISTENERS:
            listener.sock.set_inheritable(False)
            self._service.keep(NAME, listener.sock)
        settings = self._listening(self._application.settings)
        self._application.settings = settings
        _write_record(settings)
        print(f"listening on http://{settings.host}:{settings.port}", flush=True)
        if settings.run_hive:
            self._hive = HiveProcess(settings)
            self._hive.start()

    def manage_workers(self) -> None:
        """Called once a second, and after every signal."""
        super().manage_workers()
        if self._hive is not None:
            self._hive.keep()
        if self._application.has_booted():
            settings = self._application.settings
            self._service.send("READY=1", f"STATUS=Serving on {settings.host}:{settings.port}")

    def stop(self, graceful: bool = True) -> None:
        """Let the jobs end first, then the hive with its workers."""
        self._service.send("STOPPING=1", "STATUS=Waiting for running jobs to end")
        super().stop(graceful)
        if self._hive is not None:
            self._hive.stop()
            self._hive = None
        _remove_record(self._application.settings)

    def _listening(self, settings: Settings) -> Settings:
        return replace(settings, port=self.LISTENERS[0].sock.getsockname()[1])


class ServerProcess(Connections):
    """The process that serves. It knows since when it is to end."""

    current: ServerProcess | None = None

    def init_process(self) -> None:
        ServerProcess.current = self
        self._limit = connection_limit()
        die_with_parent(self.ppid, signal.SIGTERM)
        super().init_process()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        application = self.app
        if isinstance(application, QueenApplication) and application.from_peers is not None:
            self.sockets.append(application.from_peers)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.told_at is None:
            self.told_at = time.monotonic()
            gevent.get_hub().loop.run_callback(gevent.spawn, self._leave)

    def _leave(self) -> None:
        """Serve whoever comes, one request a connection, while earlier requests run on; then listen no more.

        A restart under load is not felt: clients that keep a connection are told to make a new one, and new ones are
        taken by the next process where the socket is kept (`listening`).
        """
        assert self.told_at is not None
        first = self.told_at + min(LAST_REQUEST_S, self.cfg.graceful_timeout / 30)
        last = self.told_at + self.cfg.graceful_timeout - LAST_ANSWERS_S
        while (now := time.monotonic()) < last:
            if not self.earlier_requests and (now >= first or self.idle_since() >= self.told_at):
                break
            gevent.sleep(0.05)
        self.alive = False

    @staticmethod
    def draining_since() -> float | None:
        """Return when this process was told to end (monotonic seconds), or None."""
        process = ServerProcess.current
        if process is None:
            return None
        if not process.alive and process.told_at is None:
            process.told_at = time.monotonic()
        return process.told_at


def connection_limit() -> int:
    """Return how many clients this process has descriptors for, after it asked for as many as it may have.

    A client takes two: its own connection, and the one to the worker that answers it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # macOS refuses what is over a limit of its own.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(16, min(MAX_CONNECTIONS, (soft - OTHER_DESCRIPTORS) // 2))


def _write_record(settings: Settings) -> None:
    record = QueenRecord(
        pid=os.getpid(),
        port=settings.port,
        host=settings.host,
        version=__version__,
        started_at=time.time(),
        token=settings.admin_token,
        ephemeral=settings.ephemeral,
    )
    import msgspec

    paths.write_private(settings.state_dir / RECORD, msgspec.json.encode(record))


def _remove_record(settings: Settings) -> None:
    with contextlib.suppress(OSError):
        (settings.state_dir / RECORD).unlink()


def _remove_home() -> None:
    home = Path(os.environ.get("RBEE_HOME", "/"))
    if home.parent == Path(tempfile.gettempdir()) and home.name.startswith(EPHEMERAL_PREFIX):
        shutil.rmtree(home, ignore_errors=True)
