"""End with one's parent, whatever ends it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int, with_signal: signal.Signals = signal.SIGTERM) -> None:
    """Have `with_signal` sent to this process when the process `parent_pid` dies; call it from the main thread.

    On Linux the kernel does it (prctl(2), PR_SET_PDEATHSIG: bound to the *thread* that started this process);
    elsewhere a thread looks once a second. A parent that is already dead ends this process at once.
    """
    if not parent_pid:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(with_signal), 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent_pid, with_signal), name="lifeline", daemon=True).start()
    # The parent may have died before the call above.
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), with_signal)


def _watch(parent_pid: int, with_signal: signal.Signals) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    os.kill(os.getpid(), with_signal)
