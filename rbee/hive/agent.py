"""A hive's life, from its start to its end."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import signal
import threading

import rbee
from rbee.errors import PortInUse, SetupProblem
from rbee.hive import app, cleanup, instance
from rbee.hive.instance import AlreadyRuns
from rbee.hive.service import Hive
from rbee.hive.settings import Settings
from rbee.http.server import Server
from rbee.paths import private, state_dir

M_ARENA_MAX = -8
log = logging.getLogger("rbee.hive")


def run(settings: Settings) -> int:
    """Clean up, listen, report, run until told to stop, drain; return the exit code.

    Call it from the main thread, which starts every worker (see `launch.Launcher`). Raises: RbeeError.
    """
    _follow_parent(settings.parent_pid)
    _share_one_arena()
    state = private(state_dir())
    token = instance.token_from(settings.token_file or state / "hive.token", make=settings.token_file is None)
    try:
        return _serve(settings, token, instance.claim(state, settings.port, token))
    except AlreadyRuns as other:
        _say(str(other))
        return 0


def _serve(settings: Settings, token: str, mine: instance.Instance) -> int:
    with contextlib.closing(mine):
        hive = Hive(settings, token, mine.epoch)
        cleanup.sweep(hive.launcher.folder)
        hive.launcher.prune_logs()
        hive.engines.start()
        server = _listen(settings, hive)
        mine.publish(hive.url, rbee.__version__)
        hurry = _stop_on_signals(hive)
        _say(f"listening on {hive.url}")
        hive.reporter.start()
        hive.launcher.run()
        hive.drain(settings.drain_limit_s, hurry)
        server.shutdown()
        server.server_close()
    return 0


def _follow_parent(parent_pid: int) -> None:
    if parent_pid:
        from rbee.lifeline import die_with_parent

        die_with_parent(parent_pid, signal.SIGTERM)


def _share_one_arena() -> None:
    """Keep glibc from giving each thread a heap of its own (mallopt(3)): threads come and go with connections here."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def _listen(settings: Settings, hive: Hive) -> Server:
    """Raises: AlreadyRuns, PortInUse, SetupProblem."""
    try:
        server = Server(settings.host, settings.port, app.routes(hive))
    except SetupProblem as problem:
        hive.drain(0.0, threading.Event())
        if isinstance(problem, PortInUse):
            # A hive with another folder that takes this token is the same person's.
            other = instance.probe(f"http://{settings.dialled_host}:{settings.port}", hive.token)
            if other is not None:
                raise AlreadyRuns(other.pid) from None
        raise
    hive.url = f"http://{settings.dialled_host}:{server.port}"
    server.start()
    return server


def _stop_on_signals(hive: Hive) -> threading.Event:
    """Stop at the first signal; the event that is returned is set by a second one, from whoever cannot wait."""
    hurry = threading.Event()
    told = False

    def stop(number: int, frame: object) -> None:
        nonlocal told
        if told:
            hurry.set()
        told = True
        hive.launcher.stop()

    signal.set_wakeup_fd(hive.launcher.wake_fd, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    return hurry


def _say(line: str) -> None:
    """Print the line that a caller waits for; a caller that has left is no reason to end."""
    with contextlib.suppress(OSError):
        print(line, flush=True)
