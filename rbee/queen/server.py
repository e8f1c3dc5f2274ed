"""The queen's processes: gunicorn's master, which also keeps this machine's hive, and the server process.

master ─┬─ server process (gevent, Falcon)
        └─ hive ── workers

The master does nothing but this, so it survives what may happen to a server process, and a server process that is
replaced costs no loaded model.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gevent
from gevent import monkey
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.workers.ggevent import GeventWorker

from rbee import __version__, paths
from rbee.errors import Busy, PortInUse, RbeeError, SetupProblem
from rbee.http.upstream import notice_silence
from rbee.lifeline import die_with_parent
from rbee.notify import Notifier
from rbee.queen.arguments import parse, settings_of
from rbee.queen.hive_process import HiveProcess
from rbee.queen.jwt_tokens import read_jwt_settings
from rbee.queen.settings import Settings
from rbee.wire.errors import encode_error
from rbee.wire.fleet import QueenRecord

log = logging.getLogger("rbee.queen")

RECORD = "queen.json"
EPHEMERAL_PREFIX = "rbee-ephemeral-"
MAX_CONNECTIONS = 4096
REFUSING = 64
"""Connections beyond the limit that are told so at the same time; further ones wait to be accepted."""
DESCRIPTORS = 4 * MAX_CONNECTIONS
OTHER_DESCRIPTORS = 128
NOTHING_TAKEN_S = 30.0
"""How long a client may take nothing of its answer (RFC 5482) before its connection is cut."""


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
    _check_port(settings)
    read_jwt_settings(settings.jwt_path)  # what is wrong with it is said here, before there is a server process
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    QueenArbiter(QueenApplication(settings)).run()


class QueenApplication(BaseApplication):
    """Tells gunicorn how to run, and makes the application in the server process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._boots = os.pipe()
        for end in self._boots:
            os.set_blocking(end, False)
        super().__init__()

    def load_config(self) -> None:
        settings = self.settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        values = {
            "bind": f"{host}:{settings.port}",
            "workers": 1,
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
            "proc_name": "rbee-queen",
            "post_worker_init": self.booted,
        }
        for name, value in values.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """Make the application. Called in the server process, after the fork."""
        from rbee.queen.app import create_app, create_queen, follow_fleet

        queen = create_queen(self.settings, draining_since=ServerProcess.draining_since)
        follow_fleet(queen)
        return create_app(queen)

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

    def __init__(self, app: QueenApplication) -> None:
        self._application = app
        self._hive: HiveProcess | None = None
        # gunicorn says that it is ready when it listens, before anything can answer; its children are not the service.
        self._service = Notifier.from_environment()
        super().__init__(app)

    def start(self) -> None:
        super().start()
        # gunicorn makes it inheritable for its re-exec; a hive that held it too would keep the port after the queen.
        for listener in self.LISTENERS:
            listener.sock.set_inheritable(False)
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


class ServerProcess(GeventWorker):
    """The process that serves. It knows since when it is to end, and answers malformed requests in OpenAI's form."""

    current: ServerProcess | None = None
    _told_at: float | None = None
    _connected = 0
    _limit = MAX_CONNECTIONS
    _idle: dict[gevent.Timeout, Any]
    _ending: set[gevent.Timeout]

    def init_process(self) -> None:
        ServerProcess.current = self
        self._idle = {}
        self._ending = set()
        self._connected = 0
        self._limit = connection_limit()
        die_with_parent(self.ppid, signal.SIGTERM)
        super().init_process()

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._told_at = time.monotonic()
        super().handle_exit(sig, frame)
        self._end_idle_soon()

    def notify(self) -> None:
        """Called once a second."""
        super().notify()
        if not self.alive:
            self._end_idle_soon()

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve one connection to its end; one too many takes the place of an idle one, or is told so."""
        self._connected += 1
        try:
            if self._connected > self._limit and not self._end_longest_idle():
                refuse(client, f"{self._limit} connections are open, which is the limit")
                return
            # The kernel tells a reader that takes nothing from one that is slow; a time for each write could not.
            notice_silence(client, NOTHING_TAKEN_S)
            super().handle(listener, client, addr)
        finally:
            self._connected -= 1

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        try:
            return super().handle_request(listener_name, req, sock, addr)
        except TimeoutError:
            log.info("cut the connection of %s, which took nothing for %g s", addr, NOTHING_TAKEN_S)
            raise ConnectionResetError(errno.ECONNRESET, "the client takes nothing") from None

    def _end_longest_idle(self) -> bool:
        """Close the connection that has waited longest for a request. Return False when every one carries a job."""
        longest = next((timeout for timeout in self._idle if timeout not in self._ending), None)
        if longest is not None:
            self._ending.add(longest)
            gevent.get_hub().loop.run_callback(self._end_one, longest)
        return longest is not None

    def _end_one(self, timeout: gevent.Timeout) -> None:
        self._ending.discard(timeout)
        # A request may have come in the meantime.
        if timeout in self._idle:
            self._idle[timeout].throw(timeout)

    @contextlib.contextmanager
    def timeout_ctx(self) -> Iterator[None]:  # type: ignore[override]  # the stubs take gunicorn's abstract one for all
        """Bound the wait for a connection's next request. gunicorn waits inside of it, and only then."""
        timeout = gevent.Timeout(self.cfg.keepalive, False)  # type: ignore[arg-type]  # False: end in silence
        self._idle[timeout] = gevent.getcurrent()
        try:
            with timeout:
                yield
        finally:
            del self._idle[timeout]

    def _end_idle_soon(self) -> None:
        """Close the connections that carry no request: clients keep them open, and would hold up the end."""
        gevent.get_hub().loop.run_callback(self._end_idle)

    def _end_idle(self) -> None:
        for timeout, greenlet in list(self._idle.items()):
            if timeout in self._idle:
                greenlet.throw(timeout)

    @staticmethod
    def draining_since() -> float | None:
        """Return when this process was told to end (monotonic seconds), or None."""
        process = ServerProcess.current
        if process is None or process.alive:
            return None
        process._told_at = process._told_at or time.monotonic()
        return process._told_at

    def handle_error(self, req: Any, client: Any, addr: Any, problem: BaseException) -> None:
        """Answer what gunicorn's parser refuses; everything else keeps gunicorn's way."""
        with contextlib.suppress(OSError):
            message = "The request is not valid HTTP/1.1" if req is None else "The request could not be served"
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": "bad_request"}
            body = json.dumps({"error": error}).encode()
            head = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.log.debug("refused a request from %s: %r", addr, problem)


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


def refuse(client: Any, why: str) -> None:
    """Answer 503 on a connection of which no request was read."""
    body = encode_error(Busy(why, retry_after_s=1))
    head = "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Type: application/json"
    with contextlib.suppress(OSError):
        client.settimeout(1.0)
        client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        # A close with unread bytes resets the connection, and the answer is lost with it (RFC 9112, 9.6).
        client.shutdown(socket.SHUT_WR)
        client.recv(65536)


def _check_port(settings: Settings) -> None:
    """Look before gunicorn does, which would try for five seconds and say so in its own words."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as problem:
            if problem.errno == 98:
                raise PortInUse(settings.host, settings.port) from None
            raise SetupProblem(f"Cannot listen on {settings.host}:{settings.port} ({problem.strerror})") from None


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
