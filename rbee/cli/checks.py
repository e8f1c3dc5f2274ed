"""What `rbee doctor` looks at; each check returns one line, and what to try when it is not well."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rbee import __version__
from rbee.cli import local_queen
from rbee.cli.plugin import engines
from rbee.cli.terminal import size
from rbee.client import Client
from rbee.errors import RbeeError
from rbee.paths import config_dir, state_dir
from rbee.wire.fleet import QueenStatus

OK, WARN, FAIL = "ok", "warn", "fail"
DISK_WARN_BYTES = 2 * 1024**3
DISK_FAIL_BYTES = 100 * 1024**2
MEMORY_WARN_BYTES = 1024**3
QUEEN_MODULES = {"falcon": "falcon", "gevent": "gevent", "gunicorn": "gunicorn", "rhai": "rhai-py", "tinydb": "tinydb"}
SECRETS = ("queen.json", "hive.token", "keys.sqlite")


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is (ok, warn, fail), what was seen, what to try."""

    name: str
    state: str
    seen: str
    hint: str = ""


def all_checks() -> Iterator[Check]:
    """Yield every check as soon as it is done."""
    looks: list[Callable[[], Iterator[Check]]] = [
        _python,
        _packages,
        _state_folder,
        _disk,
        _memory,
        _queen,
        _ports,
        _engines,
        _built_in_model,
        _script,
        _secrets,
        _completion,
    ]
    for look in looks:
        yield from look()


def _python() -> Iterator[Check]:
    seen = f"{platform.python_version()} at {sys.executable}"
    good = sys.version_info >= (3, 11)
    yield Check("python", OK if good else FAIL, seen, "" if good else "Python 3.11 or newer")


def _packages() -> Iterator[Check]:
    missing = [package for module, package in QUEEN_MODULES.items() if importlib.util.find_spec(module) is None]
    if missing:
        yield Check(
            "packages", FAIL, f"missing for the queen and hive: {', '.join(missing)}", "pip install 'rbee[queen,hive]'"
        )
    else:
        yield Check("packages", OK, f"rbee {__version__} with all that queen and hive need")


def _state_folder() -> Iterator[Check]:
    folder = state_dir()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        yield Check(
            "state folder",
            FAIL,
            f"{folder} cannot be written ({problem.strerror})",
            f"ls -ld {folder}, or set RBEE_HOME",
        )
        return
    if folder.stat().st_mode & 0o077:
        yield Check("state folder", WARN, f"{folder} is open to others", f"chmod 700 {folder}")
    else:
        yield Check("state folder", OK, f"{folder} can be written")


def _disk() -> Iterator[Check]:
    folder = next(path for path in (state_dir(), *state_dir().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    state = FAIL if free < DISK_FAIL_BYTES else WARN if free < DISK_WARN_BYTES else OK
    yield Check(
        "disk", state, f"{size(free)} free at {folder}", "" if state == OK else "make room: models and logs need it"
    )


def _memory() -> Iterator[Check]:
    from rbee.hive.observe import cpu

    found = cpu()
    state = WARN if found.memory_free_bytes < MEMORY_WARN_BYTES else OK
    seen = f"{size(found.memory_free_bytes)} of {size(found.memory_total_bytes)} free, {found.name}"
    yield Check("memory", state, seen, "" if state == OK else "rbee worker list, rbee worker stop NAME")


def _queen() -> Iterator[Check]:
    record = local_queen.find()
    if record is None:
        stale = local_queen.record_path().exists()
        hint = "rbee queen start, which removes the old record" if stale else ""
        yield Check("queen", WARN if stale else OK, "none runs" + (", but one was killed" if stale else ""), hint)
        return
    url = local_queen.url_of(record)
    with contextlib.closing(Client(url, token=record.token, timeout_s=5.0)) as client:
        try:
            status = client.get("/v1/orchestrator/status", QueenStatus)
        except RbeeError as problem:
            yield Check(
                "queen",
                FAIL,
                f"process {record.pid} at {url} does not answer: {problem}",
                "rbee queen stop, then start",
            )
            return
    older = local_queen.older(status.version)
    yield Check(
        "queen",
        WARN if older else OK,
        f"version {status.version} at {url}, process {record.pid}",
        "rbee queen start, which replaces it" if older else "",
    )
    yield from _fleet(status)


def _fleet(status: QueenStatus) -> Iterator[Check]:
    if not status.hives:
        yield Check("hive", FAIL, "no machine reports to the queen", "rbee queen logs")
    for hive in status.hives:
        other = hive.version != __version__
        state = FAIL if hive.state == "lost" else WARN if other else OK
        hint = {
            FAIL: f"is {hive.hive} on? rbee hive status {hive.hive}",
            WARN: f"install rbee {__version__} there",
        }.get(state, "")
        yield Check(
            "hive", state, f"{hive.hive} is {hive.state}, version {hive.version}, {len(hive.workers)} workers", hint
        )
        for worker in hive.workers:
            if worker.state == "failed":
                seen = f"{hive.hive}/{worker.name} failed: {worker.reason}"
                yield Check("worker", WARN, seen, f"rbee worker logs {hive.hive}/{worker.name}")
    if status.scheduler_error:
        yield Check(
            "queen's script", FAIL, status.scheduler_error, f"correct {status.scheduler}; it is read again when saved"
        )


def _ports() -> Iterator[Check]:
    options = local_queen.Options.from_environment()
    record = local_queen.find()
    for name, port in (("queen", options.port), ("hive", options.hive_port)):
        wanted = {"queen": 7833, "hive": 7835}[name] if port is None else port
        title = f"{name}'s port"
        if record is not None and (name == "hive" or record.port == wanted):
            yield Check(title, OK, "in use by our own queen and hive")
        elif wanted == 0 or _is_free(wanted):
            yield Check(title, OK, f"{wanted or 'any'} is free")
        else:
            hint = f"ss -ltnp 'sport = :{wanted}', or RBEE_{name.upper()}_PORT=0"
            yield Check(title, FAIL, f"{wanted} is in use by another program", hint)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as problem:
            return problem.errno != errno.EADDRINUSE
    return True


def _engines() -> Iterator[Check]:
    try:
        found = engines()
    except RbeeError as problem:
        yield Check("engine", FAIL, problem.message, problem.hint or "")
        return
    for engine in found:
        state = WARN if engine.problem else OK
        yield Check(
            "engine",
            state,
            f"{engine.name} {engine.problem or engine.version}",
            "rbee plugin list" if engine.problem else "",
        )
    if not any("chat" in engine.capabilities and "gguf" in engine.formats and not engine.problem for engine in found):
        yield Check("engine", FAIL, "no engine here can chat with a GGUF model", "pip install rbee-xllamacpp")


def _built_in_model() -> Iterator[Check]:
    folder = Path(__file__).parent.parent / "models"
    file, card = folder / "rbee-demo.gguf", folder / "CARD.md"
    if not file.exists() or not card.exists():
        yield Check("built-in model", FAIL, f"{file if card.exists() else card} is missing", "install rbee again")
        return
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    good = digest in re.findall(r"\b[0-9a-f]{64}\b", card.read_text("utf-8"))
    seen = f"rbee-demo, {size(file.stat().st_size)}" + ("" if good else ": its SHA-256 is not the one on its card")
    yield Check("built-in model", OK if good else FAIL, seen, "" if good else "install rbee again")


def _script() -> Iterator[Check]:
    path = config_dir() / "scheduler.rhai"
    if not path.exists():
        yield Check("script", OK, f"the built-in one ({path} does not exist)")
        return
    try:
        from rbee.queen.script import compile_script

        compile_script(path.read_text("utf-8"), str(path))
    except ImportError as problem:
        yield Check("script", FAIL, f"{path} cannot be checked: {problem}", "pip install rhai-py")
    except (OSError, UnicodeDecodeError) as problem:
        yield Check("script", FAIL, f"{path} cannot be read: {problem}", f"ls -l {path}")
    except RbeeError as problem:
        yield Check("script", FAIL, problem.message, problem.hint or "correct it; the built-in one decides until then")
    else:
        yield Check("script", OK, f"{path} compiles")


def _secrets() -> Iterator[Check]:
    there = [state_dir() / name for name in SECRETS if (state_dir() / name).exists()]
    exposed = [path for path in there if path.stat().st_mode & 0o077]
    for path in exposed:
        yield Check("secrets", FAIL, f"{path} is open to others", f"chmod 600 {path}")
    if not exposed:
        yield Check("secrets", OK, f"{len(there)} files, none open to others")


def _completion() -> Iterator[Check]:
    shell = Path(os.environ.get("SHELL", "")).name
    home = Path.home()
    places = {
        "bash": [home / ".local/share/bash-completion/completions/rbee"],
        "zsh": [home / ".zfunc/_rbee"],
        "fish": [home / ".config/fish/completions/rbee.fish"],
    }
    if shell not in places:
        yield Check("completion", OK, f"for bash, zsh and fish; the shell here is {shell or 'not known'}")
    elif any(place.exists() for place in places[shell]):
        yield Check("completion", OK, f"installed for {shell}")
    else:
        yield Check("completion", OK, f"not installed for {shell}; see rbee completion --help")
