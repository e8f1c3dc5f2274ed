"""A hive's life, from its start to its end."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from pathlib import Path

import rbee
from rbee.errors import PortInUse, SetupProblem
from rbee.hive import app, cleanup, instance
from rbee.hive.instance import AlreadyRuns
from rbee.hive.pulse import Pulse
from rbee.hive.service import Hive
from rbee.hive.settings import Settings
from rbee.http.server import Server
from rbee.http.tls import client_context, server_context
from rbee.lean import give_back_free_memory, share_one_arena
from rbee.notify import Notifier
from rbee.paths import private, state_dir

SETTLE_S = 3.0
"""How long the first look at the declared workers may take before this hive counts as ready."""
log = logging.getLogger("rbee.hive")


def run(settings: Settings) -> int:
    """Clean up, listen, report, run until told to stop, drain; return the exit code.

    Call it from the main thread, which starts every worker (see `launch.Launcher`). Raises: RbeeError.
    """
    notifier = Notifier.from_environment()
    _follow_parent(settings.parent_pid)
    share_one_arena()
    authority = client_context(settings.authority) if settings.authority else None
    state = private(state_dir())
    token = instance.token_from(settings.token_file or state / "hive.token", make=settings.token_file is None)
    try:
        mine = instance.claim(state, settings.port, token, authority)
        return _serve(Hive(settings, token, mine.epoch, authority), settings, mine, notifier)
    except AlreadyRuns as other:
        _say(str(other))
        return 0


def _serve(hive: Hive, settings: Settings, mine: instance.Instance, notifier: Notifier) -> int:
    with contextlib.closing(mine):
        cleanup.sweep(hive.launcher.folder)
        hive.launcher.prune_logs()
        hive.engines.start()
        server = _listen(settings, hive)
        mine.publish(hive.near_url, rbee.__version__)
        hurry = _stop_on_signals(hive)
        hive.declared.start(settle_s=SETTLE_S)
        pulse = Pulse(notifier, server, hive.probe)
        pulse.start(f"{settings.name} on {hive.url}")
        give_back_free_memory()
        _say(f"listening on {hive.url}")
        hive.reporter.start()
        hive.launcher.run()
        pulse.stopping()
        hive.drain(settings.drain_limit_s, hurry)
        server.shutdown()
        server.server_close()
    return 0


def _follow_parent(parent_pid: int) -> None:
    if parent_pid:
        from rbee.lifeline import die_with_parent

        die_with_parent(parent_pid, signal.SIGTERM)


def _listen(settings: Settings, hive: Hive) -> Server:
    """Raises: AlreadyRuns, PortInUse, SetupProblem."""
    try:
        tls = server_context(Path(settings.tls.certificate), Path(settings.tls.key)) if settings.tls else None
        server = Server(settings.host, settings.port, app.routes(hive), tls=tls)
    except SetupProblem as problem:
        hive.drain(0.0, threading.Event())
        if isinstance(problem, PortInUse):
            # A hive with another folder that takes this token is the same person's.
            near = f"{settings.scheme}://{settings.near_host}:{settings.port}"
            other = instance.probe(near, hive.token, hive.authority)
            if other is not None:
                raise AlreadyRuns(other.pid) from None
        raise
    hive.url = f"{settings.scheme}://{settings.dialled_host}:{server.port}"
    hive.near_url = f"{settings.scheme}://{settings.near_host}:{server.port}"
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
