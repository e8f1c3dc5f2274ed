"""A queen, hive and worker for one job, in a folder of their own, of which nothing stays.

Whatever dies, the rest ends: the queen is sent SIGTERM by the kernel when `rbee` dies (`--parent`), and removes the
folder; when the queen dies, `rbee` sees to it that her hive and workers have ended, and removes the folder.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from rbee.cli import local_queen
from rbee.cli.door import Address, only_hive
from rbee.cli.local_queen import Step
from rbee.cli.processes import command_line, processes_with
from rbee.cli.queen_log import last_words
from rbee.client import Client
from rbee.errors import UnknownModel
from rbee.paths import state_dir
from rbee.wire.fleet import AddModel, ModelReport

PREFIX = "rbee-ephemeral-"
END_TIMEOUT_S = 12.0
FOLLOW_TIMEOUT_S = 6.0
KILL_TIMEOUT_S = 5.0


@contextlib.contextmanager
def ephemeral_queen(model: str, step: Step) -> Iterator[Address]:
    """Yield a queen that knows the person's own `model`, and end everything that belongs to her afterwards.

    Raises: SetupProblem when she does not start, UnknownModel.
    """
    path = _listed(model)
    sweep()
    # She makes the folder herself: an `rbee` that is killed before this line's process starts leaves nothing.
    home = Path(tempfile.gettempdir()) / f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
    with tempfile.TemporaryFile() as log:
        process = None
        try:
            step("starting the queen")
            process = _start(home, log)
            record = local_queen.wait_until_up(process, home / "state" / "queen.json", lambda: _last_words(log))
            address = Address(local_queen.url_of(record), record.token, local=True)
            if path is not None:
                step(f"reading {path}")
                _lend(address, model, path)
            yield address
        finally:
            step("ending the queen")
            end(process, home)


def end(process: subprocess.Popen[bytes] | None, home: Path) -> None:
    """End the queen and what she started, and remove their folder; a second Ctrl+C makes it quick."""
    try:
        if process is not None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_TIMEOUT_S)
        _await_end_of(home, FOLLOW_TIMEOUT_S)
    finally:
        # Also for a queen that was killed, whose hive and workers may take a moment to notice.
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        for pid in processes_with(mark(home)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _await_end_of(home, KILL_TIMEOUT_S)
        shutil.rmtree(home, ignore_errors=True)


def sweep() -> None:
    """Remove the folders that an `rbee` and its queen left which were both killed at the same moment."""
    for home in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        owner = re.match(rf"{PREFIX}(\d+)-", home.name)
        with contextlib.suppress(OSError):
            mine = home.stat().st_uid == os.getuid()
            if owner and mine and not command_line(int(owner[1])) and not processes_with(mark(home)):
                shutil.rmtree(home, ignore_errors=True)


def _await_end_of(home: Path, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while processes_with(mark(home)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _start(home: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    arguments = ["--ephemeral", "--port", "0", "--hive-port", "0", "--parent", str(os.getpid())]
    return local_queen.spawn(arguments, log, environment={**os.environ, "RBEE_HOME": str(home)})


def _last_words(log: IO[bytes]) -> str:
    log.seek(0)
    return last_words(log.read(1_000_000).decode(errors="replace").splitlines())


def _listed(model: str) -> str | None:
    """Return the path of a model on the person's own list, or None for one that comes with rbee.

    The list is the catalog of this machine's hive (TinyDB's form), which is read and not opened: it has one writer.
    """
    try:
        catalog = msgspec.json.decode((state_dir() / "catalog.json").read_bytes(), type=dict[str, dict[str, Any]])
        listed = {str(entry["name"]): str(entry["path"]) for entry in catalog.get("models", {}).values()}
    except (OSError, msgspec.DecodeError, KeyError, TypeError):
        return None
    if model in listed:
        return listed[model]
    from rbee.cli.plugin import engines

    own = ["rbee-demo", *(engine.name for engine in engines() if not engine.formats)] if listed else [model]
    if model not in own:
        names = sorted({*listed, *own})
        raise UnknownModel(model, difflib.get_close_matches(model, names), names)
    return None


def _lend(address: Address, model: str, path: str) -> None:
    with contextlib.closing(Client(address.url, token=address.token)) as client:
        client.post(
            f"/v1/hives/{only_hive(client)}/models", AddModel(path=path, name=model), ModelReport, timeout_s=120.0
        )


def mark(home: Path) -> str:
    """Return the entry of the environment by which a process is known to belong to this folder."""
    return f"RBEE_HOME={home}"
