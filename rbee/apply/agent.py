"""The program that `rbee apply` runs on a host. It is sent as text over ssh, so it needs the standard library alone.

It reads orders, one JSON object a line, from standard input, and answers each with one line. What runs on the host
does not depend on the connection: a transaction that has begun ends by itself, also when the controller is gone.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import glob
import hashlib
import http.client
import json
import os
import platform
import pwd
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

ETC, LIB, OPT, UNITS = "/etc/rbee", "/var/lib/rbee", "/opt/rbee", "/etc/systemd/system"
LOCK, TRANSACTION_LOCK = "/run/rbee.lock", "/run/rbee.transaction.lock"
AUDIT, RECORDS, HISTORY = f"{LIB}/audit.jsonl", f"{LIB}/records", f"{LIB}/history"
MODELS, MODEL_SUMS = f"{LIB}/models", f"{LIB}/models/.sha256.json"
MARKER = "[X-Rbee]"
OWNED_FOLDERS = (f"{ETC}/workers", f"{ETC}/worker-tokens", f"{ETC}/server-keys", f"{ETC}/secrets", f"{ETC}/inventory")
SECRET_FOLDERS = (f"{ETC}/secrets/", f"{ETC}/worker-tokens/", f"{ETC}/server-keys/")
OWNED_FILES = (f"{ETC}/hive.yaml", f"{ETC}/queen.yaml", f"{ETC}/gitops.yaml")
UNIT_PROPERTIES = (
    "Id", "LoadState", "ActiveState", "SubState", "UnitFileState", "NRestarts", "Result", "NeedDaemonReload"
)  # fmt: skip
HISTORY_KEPT = 10
AUDIT_BYTES = 8 * 1024 * 1024
TRANSACTION_WAIT_S = 900
CHUNK = 1 << 20
Order = dict[str, Any]


class Failed(Exception):
    """An order cannot be carried out; the message is for a person. `extra` is for the controller."""

    def __init__(self, message: str, **extra: Any) -> None:
        super().__init__(message)
        self.extra = extra


def main() -> None:
    """Answer orders until the controller closes its side."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for line in sys.stdin.buffer:
        order = json.loads(line)
        try:
            answer = {"ok": ORDERS[order.pop("do")](order)}
        except Failed as problem:
            answer = {"error": str(problem), **problem.extra}
        except OSError as problem:
            where = f"{problem.filename}: " if problem.filename else ""
            answer = {"error": f"{where}{problem.strerror or problem}", "errno": problem.errno}
        say(answer)


def say(answer: Any) -> None:
    """Write one line to the controller, who may be gone."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(answer).encode() + b"\n")


# --- what there is


def observe(order: Order) -> dict[str, Any]:
    """Tell everything that rbee owns here, and what its units need to know of the machine."""
    units = _unit_files()
    return {
        "python": list(sys.version_info[:3]),
        "executable": os.path.realpath(sys.executable),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "cpu_flags": _cpu_flags(),
        "systemd": os.path.isdir("/run/systemd/system"),
        "boot_id": _text("/proc/sys/kernel/random/boot_id").strip(),
        "disk_free_bytes": _free_bytes(),
        "users": {name: _uid(name) for name in order.get("users", [])},
        "device_names": _device_names(),
        "programs": [name for name in order.get("programs", []) if shutil.which(name)],
        "files": {path: _file(path) for path in [*_owned_files(), *units]},
        "folders": {path: _mode(path) for path in order.get("folders", [])},
        "units": _unit_states([os.path.basename(path) for path in units]),
        "records": {name: json.loads(_text(f"{RECORDS}/{name}")) for name in _names(RECORDS) if name.endswith(".json")},
        "layers": _names(f"{OPT}/layers"),
        "releases": _names(f"{OPT}/releases"),
        "current": os.path.basename(os.readlink(f"{OPT}/current")) if os.path.islink(f"{OPT}/current") else "",
        "models": _models(),
        "certificate": _text(f"{ETC}/secrets/host.crt"),
        "busy_ports": _busy_ports(order.get("ports", [])),
    }


def _owned_files() -> list[str]:
    inside = [path for folder in OWNED_FOLDERS for path in glob.glob(f"{folder}/**", recursive=True)]
    return sorted(path for path in [*OWNED_FILES, *inside] if os.path.isfile(path) or os.path.islink(path))


def _unit_files() -> list[str]:
    """Return the unit files that carry rbee's marker; others of that name are somebody else's."""
    paths = sorted(glob.glob(f"{UNITS}/rbee*.*"))
    return [path for path in paths if os.path.isfile(path) and MARKER in _text(path)]


def _file(path: str) -> dict[str, Any]:
    status = os.lstat(path)
    data = _bytes(path)
    found: dict[str, Any] = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "mode": status.st_mode & 0o7777,
        "uid": status.st_uid,
    }
    if not path.startswith(SECRET_FOLDERS):
        found["text"] = data.decode("utf-8", "replace")
    return found


def _unit_states(names: list[str]) -> dict[str, dict[str, str]]:
    """Ask systemd once for every unit; one that it does not know is `not-found`."""
    wanted = [name for name in names if "@." not in name]
    if not wanted:
        return {}
    command = ["systemctl", "show", "--no-pager", f"--property={','.join(UNIT_PROPERTIES)}", *wanted]
    output = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    blocks = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in output.split("\n\n")]
    return {block["Id"]: block for block in blocks if "Id" in block}


def _models() -> dict[str, dict[str, Any]]:
    """Return each model file's size and SHA-256; one that did not change since it was hashed is not read again."""
    try:
        known = json.loads(_text(MODEL_SUMS) or "{}")
    except ValueError:
        known = {}
    found: dict[str, dict[str, Any]] = {}
    for name in _names(MODELS):
        path = f"{MODELS}/{name}"
        if name.startswith(".") or not os.path.isfile(path):
            continue
        status = os.stat(path)
        seal = [status.st_size, status.st_mtime_ns, status.st_ino]
        if known.get(name, {}).get("seal") != seal:
            known[name] = {"seal": seal, "sha256": _sha256(path)}
        found[name] = {"size_bytes": status.st_size, "sha256": known[name]["sha256"]}
    kept = {name: known[name] for name in found}
    if kept != json.loads(_text(MODEL_SUMS) or "{}"):
        write(MODEL_SUMS, json.dumps(kept).encode(), 0o644)
    return found


def _cpu_flags() -> list[str]:
    for line in _text("/proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            return sorted(line.partition(":")[2].split())
    return []


def _device_names() -> list[str]:
    """Return the accelerators' device nodes, and the names in /proc/devices that a unit may allow."""
    nodes = [path for pattern in ("/dev/nvidia*", "/dev/kfd", "/dev/dri/render*") for path in glob.glob(pattern)]
    kinds = [line.split()[1] for line in _text("/proc/devices").splitlines() if len(line.split()) == 2]
    wanted = ("nvidia", "drm", "kfd", "accel")
    return sorted({*nodes, *(f"char-{kind}" for kind in kinds if kind.startswith(wanted))})


def _free_bytes() -> int:
    """Return what is free where the least is: the releases' disk or the models'."""
    free = []
    for path in (OPT, LIB):
        while not os.path.isdir(path):
            path = os.path.dirname(path)
        free.append(shutil.disk_usage(path).free)
    return min(free)


def _busy_ports(ports: list[int]) -> list[int]:
    """Return which of the ports somebody listens on (proc_net_tcp(5): state 0A)."""
    busy = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in _text(table).splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                busy.add(int(fields[1].rpartition(":")[2], 16))
    return [port for port in ports if port in busy]


# --- locks


_held: list[int] = []


def lock(order: Order) -> dict[str, Any]:
    """Take this host's lock until this program ends. Raises: Failed with the holder."""
    descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(descriptor, 4096).decode("utf-8", "replace")
        os.close(descriptor)
        raise Failed("another apply holds this host", busy=holder) from None
    _held.append(descriptor)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"who": order["who"], "since": time.time()}).encode(), 0)
    return {}


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Wait for a transaction whose controller died; it goes on without the lock that died with it."""
    descriptor = os.open(TRANSACTION_LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + TRANSACTION_WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise Failed("an earlier apply is still at work on this host") from None
                time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


# --- bytes that arrive


def put(order: Order) -> dict[str, Any]:
    """Write `size_bytes` that follow on standard input to `path`, whole and checked, or leave no trace."""
    path, left, digest = order["path"], order["size_bytes"], hashlib.sha256()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    problem: OSError | None = None
    partial = f"{os.path.dirname(path)}/.{os.path.basename(path)}.partial"
    with contextlib.ExitStack() as undo:
        undo.callback(_remove, partial)
        with open(partial, "wb") as file:
            while left:
                data = sys.stdin.buffer.read(min(CHUNK, left))
                if not data:
                    raise Failed("the connection ended in the middle of a file")
                left -= len(data)
                digest.update(data)
                if problem is None:
                    try:
                        file.write(data)
                    except OSError as trouble:  # the rest must still be read, or the next order would be its bytes
                        problem = trouble
            if problem is None:
                file.flush()
                os.fsync(file.fileno())
        if problem is not None:
            raise Failed(f"{path}: {problem.strerror}", errno=problem.errno) from None
        if digest.hexdigest() != order["sha256"]:
            raise Failed(f"{path}: what arrived has sha256 {digest.hexdigest()}, not {order['sha256']}")
        os.chmod(partial, order.get("mode", 0o644))
        os.replace(partial, path)
        undo.pop_all()
    return {}


def get(order: Order) -> dict[str, Any]:
    """Send a file: one line with its size, then its bytes."""
    with open(order["path"], "rb") as file:
        size = os.fstat(file.fileno()).st_size
        say({"size_bytes": size})
        while data := file.read(CHUNK):
            os.write(1, data)
    return {}


def fetch(order: Order) -> dict[str, Any]:
    """Download a file from the internet, checked by its SHA-256."""
    path = order["path"]
    partial = f"{os.path.dirname(path)}/.{os.path.basename(path)}.partial"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    digest, done, told = hashlib.sha256(), 0, 0.0
    with contextlib.ExitStack() as undo:
        undo.callback(_remove, partial)
        with urllib.request.urlopen(order["url"], timeout=30) as answer, open(partial, "wb") as file:
            while data := answer.read(CHUNK):
                file.write(data)
                digest.update(data)
                done += len(data)
                if time.monotonic() - told > 0.5:
                    told = time.monotonic()
                    say({"event": "bytes", "done": done, "total": int(answer.headers.get("Content-Length") or 0)})
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != order["sha256"]:
            raise Failed(f"{order['url']} has sha256 {digest.hexdigest()}, not {order['sha256']}")
        os.replace(partial, path)
        undo.pop_all()
    return {}


def receive(order: Order) -> dict[str, Any]:
    """Take a release in the next `size_bytes`. `source` is the text of `unpack.py`, which knows its form."""
    program = _unpack_program(order)
    stream = _Counted(order["size_bytes"])
    try:
        return {"release": program["receive"](OPT, stream)}
    except program["Damaged"] as problem:
        raise Failed(str(problem)) from None
    finally:
        # What is left would be read as the next order.
        while stream.read(CHUNK):
            pass


def _unpack_program(order: Order) -> dict[str, Any]:
    program: dict[str, Any] = {"__name__": "rbee_unpack"}
    exec(compile(order["source"], "rbee-unpack", "exec"), program)
    return program


class _Counted:
    """The next so many bytes of standard input, as a file."""

    def __init__(self, size_bytes: int) -> None:
        self._left = size_bytes

    def read(self, size: int = -1) -> bytes:
        data = sys.stdin.buffer.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data

    def readline(self) -> bytes:
        data = sys.stdin.buffer.readline(self._left)
        self._left -= len(data)
        return data


# --- a transaction


def transact(order: Order) -> dict[str, Any]:
    """Bring one role of this host to its wanted state, or bring the state before it back.

    In this order: folders and user, stop what leaves, write and delete files, one daemon-reload, then service by
    service: drain, activate, health. A service that does not come up gets its files of before back.
    """
    with _alone():
        begun = time.time()
        backup = {path: _backup(path) for path in [*order["files"], *order["delete"]]}
        outcome: dict[str, Any] = {"changed": [], "failed": {}}
        try:
            _prepare(order)
            for unit in order["stop"]:
                _stop(unit, order)
            _write_all(order)
            if order["enable"]:
                _systemctl("enable", "--quiet", *order["enable"])
            for unit in order.get("start", []):
                _systemctl("start", unit)
            for service in order["services"]:
                _activate(service, order, backup, outcome)
            for unit in order["gone"]:
                _systemctl("reset-failed", unit, check=False)
                _remove(f"{RECORDS}/{unit}.json")
        except Failed as problem:
            outcome["error"] = str(problem)
        _record(order, outcome, begun)
        if "error" in outcome:
            raise Failed(outcome["error"], outcome=outcome)
        return outcome


def _prepare(order: Order) -> None:
    user = order.get("user")
    if user and _uid(user) is None:
        command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", LIB,
                   "--shell", "/usr/sbin/nologin", user]  # fmt: skip
        _run(command, f"the user {user} cannot be made")
    for path, (mode, owner) in order["folders"].items():
        os.makedirs(path, exist_ok=True)
        os.chmod(path, mode)
        _own(path, owner)
    if order.get("release"):
        _point_to(order["release"])


def _point_to(release: str) -> None:
    fresh = f"{OPT}/.current.{os.getpid()}"
    os.symlink(f"releases/{release}", fresh)
    os.replace(fresh, f"{OPT}/current")


def _write_all(order: Order) -> None:
    units_changed = False
    for path, file in order["files"].items():
        write(path, base64.b64decode(file["content"]), file["mode"])
        _own(path, file["owner"])
        units_changed |= path.startswith(UNITS)
    for path in order["delete"]:
        _remove(path)
        units_changed |= path.startswith(UNITS)
    if units_changed or order.get("reload"):
        _systemctl("daemon-reload")


def _activate(service: Order, order: Order, backup: dict[str, Any], outcome: dict[str, Any]) -> None:
    unit = service["unit"]
    say({"event": "service", "unit": unit, "state": "starting"})
    problem = _start(service, order)
    if not problem:
        write(f"{RECORDS}/{unit}.json", json.dumps({"hash": service["hash"], "at": time.time()}).encode(), 0o644)
        outcome["changed"].append(unit)
        say({"event": "service", "unit": unit, "state": "ready"})
        return
    outcome["failed"][unit] = problem
    say({"event": "service", "unit": unit, "state": "failed", "reason": problem})
    came_back = _roll_back(service, order, backup)
    what = "its previous form runs again" if came_back else "it had no previous form that ran, so it is stopped"
    raise Failed(f"{unit} did not become ready: {problem}; {what}")


def _start(service: Order, order: Order) -> str:
    """(Re)start a unit and wait until it answers; return what is wrong, or nothing.

    Its socket goes and comes with it, for the unit requires it. A start, not a restart: a restart of a unit that is
    between two tries of `Restart=` returns before the next try. Only what runs, and has systemd keep its sockets, is
    restarted: between a stop and a start systemd would close them, and refuse whoever connects.
    """
    unit, socket = service["unit"], service.get("socket", "")
    units = [name for name in (unit, socket) if name]
    _drain(service)
    limit_s = service.get("limit_s") or 90
    if _keeps_sockets(unit):
        problem = _systemctl("restart", unit, check=False, timeout_s=limit_s + 90)
    else:
        _systemctl("stop", *units, check=False)
        _systemctl("reset-failed", *units, check=False)
        problem = _systemctl("start", unit, check=False, timeout_s=limit_s + 30)
    if problem:
        why = _why(unit, socket, problem)
        _systemctl("stop", *units, check=False)
        return why
    health = service.get("health")
    return _healthy(health) if health else ""


def _roll_back(service: Order, order: Order, backup: dict[str, Any]) -> bool:
    """Bring back what this service's files were, and have it run if it ran; return whether it does."""
    unit = service["unit"]
    path = f"{UNITS}/{unit}"
    is_new = path in backup and backup[path] is None
    for path in service["files"]:
        if path in backup:
            _restore(path, backup[path])
    _systemctl("daemon-reload", check=False)
    if os.path.isdir(f"{OPT}/releases/{service.get('release_before') or '.missing'}"):
        _point_to(service["release_before"])
    if is_new:
        _systemctl("disable", "--quiet", unit, check=False)
        return False
    return not _start({**service, "health": None, "drain_s": 0}, order)


def _stop(unit: str, order: Order) -> None:
    say({"event": "service", "unit": unit, "state": "stopping"})
    for service in order.get("draining", []):
        if service["unit"] == unit:
            _drain(service)
    _systemctl("disable", "--quiet", unit, check=False)
    _systemctl("stop", unit, check=False)


def _drain(service: Order) -> None:
    """Have a worker take no new job, and wait for those that run; a worker that does not answer has none."""
    door, limit_s = service.get("door"), service.get("drain_s", 0)
    if not door or not door["port"] or not limit_s or not _is_active(service["unit"]):
        return
    deadline = time.monotonic() + limit_s
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
        _ask(door, "POST", "/v1/worker/drain")
        told = None
        while time.monotonic() < deadline:
            jobs = _ask(door, "GET", "/health")[1].get("in_flight", 0)
            if not jobs:
                return
            if jobs != told:
                say({"event": "service", "unit": service["unit"], "state": "draining", "jobs": jobs})
                told = jobs
            time.sleep(0.1)


def _healthy(health: Order) -> str:
    """Ask a service until it says that it is ready, then a worker for one token; return what is wrong, or nothing."""
    deadline = time.monotonic() + health["limit_s"]
    problem = "it gave no answer"
    while time.monotonic() < deadline:
        try:
            status, body = _ask(health, "GET", "/health")
            problem = str(body.get("reason") or f"/health says {body.get('status', status)}")
            if status == 200:
                return _one_token(health) if health.get("model") else ""
        except (OSError, ValueError, http.client.HTTPException) as trouble:
            problem = f"{health['url']}/health: {trouble}"
        time.sleep(0.05)
    return problem


def _one_token(health: Order) -> str:
    try:
        about = _ask(health, "GET", "/v1/models")[1]["data"][0].get("rbee", {})
        if "chat" in about.get("capabilities", []):
            body = {"model": health["model"], "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
            status, answer = _ask(health, "POST", "/v1/chat/completions", body, timeout_s=health["limit_s"])
            if status != 200:
                return f"a first chat was answered with {status}: {answer.get('error', {}).get('message', '')}"
    except (OSError, ValueError, LookupError, http.client.HTTPException) as trouble:
        return f"a first chat failed: {trouble}"
    return ""


def _ask(door: Order, method: str, path: str, body: Any = None, *, timeout_s: float = 5.0) -> tuple[int, Any]:
    """Call a service of this host on its loopback address."""
    port = door["port"]
    if door.get("tls", True):
        context = ssl.create_default_context(cadata=door["authority"])
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            "127.0.0.1", port, timeout=timeout_s, context=context
        )
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    with contextlib.closing(connection):
        token = door.get("token") or _text(f"{ETC}/worker-tokens/{door.get('token_of', '')}").strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"{}")


def _why(unit: str, socket: str, status: str) -> str:
    """Return the last words of a unit that did not start, and systemd's own."""
    states = _unit_states([name for name in (socket, unit) if name])
    if states.get(socket, {}).get("ActiveState") == "failed":
        unit = socket
    result = states.get(unit, {}).get("Result", "")
    command = ["journalctl", "--no-pager", "--quiet", "-o", "cat", "-n", "40", "-u", unit]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.splitlines()
    own = [line.strip() for line in lines if line.strip() and not line.startswith((unit, "Start", "Stop", "Fail"))]
    last = next((line for line in reversed(own) if "rbee " in line or "rror" in line or "ailed to" in line), "")
    last = last or (own[-1] if own else status)
    return f"{last} ({result})" if result not in ("", "success") else last


def _record(order: Order, outcome: dict[str, Any], begun: float) -> None:
    """Append to the audit log, and keep the state that was reached, for a rollback."""
    line = {
        "at": begun,
        "seconds": round(time.time() - begun, 3),
        **order.get("audit", {}),
        "role": order.get("role", ""),
        "changed": outcome["changed"],
        "failed": outcome["failed"],
        "error": outcome.get("error", ""),
    }
    os.makedirs(LIB, exist_ok=True)
    if os.path.exists(AUDIT) and os.path.getsize(AUDIT) > AUDIT_BYTES:
        os.replace(AUDIT, f"{AUDIT}.1")
    descriptor = os.open(AUDIT, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    try:
        os.write(descriptor, json.dumps(line).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep(order: Order) -> dict[str, Any]:
    """Keep what this host was brought to, as the newest of its history. The document holds secrets: mode 0600."""
    os.makedirs(HISTORY, mode=0o700, exist_ok=True)
    os.chmod(HISTORY, 0o700)
    write(f"{HISTORY}/{order['name']}.json", json.dumps(order["document"]).encode(), 0o600)
    # Names begin with a time. Those of writes that a crash cut short begin with a dot.
    for name in [name for name in _names(HISTORY) if not name.startswith(".")][:-HISTORY_KEPT]:
        _remove(f"{HISTORY}/{name}")
    return {}


def collect(order: Order) -> dict[str, Any]:
    """Delete the releases that neither a process, nor `current`, nor a kept state names. `source` is `unpack.py`."""
    kept = [json.loads(_text(f"{HISTORY}/{name}") or "{}").get("release", "") for name in _names(HISTORY)]
    return {"deleted": _unpack_program(order)["collect"](OPT, kept)}


def history(order: Order) -> dict[str, Any]:
    """Return the audit log's last lines and the states that can be rolled back to; with `name`, one of those whole."""
    if "name" in order:
        return {"document": json.loads(_text(f"{HISTORY}/{order['name']}.json") or "null")}
    text = _text(AUDIT)
    if len(text) < AUDIT_BYTES // 8:
        text = _text(f"{AUDIT}.1") + text
    lines = text.splitlines()[-int(order.get("lines", 50)) :]
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    names = [name.removesuffix(".json") for name in _names(HISTORY) if not name.startswith(".")]
    return {"audit": entries, "states": names}


def jobs(order: Order) -> dict[str, int]:
    """Return how many jobs run on each worker that is named with its door."""
    found = {}
    for name, door in order["workers"].items():
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            found[name] = int(_ask(door, "GET", "/health", timeout_s=2.0)[1].get("in_flight", 0))
    return found


def status(order: Order) -> dict[str, Any]:
    """Tell how the services here fare: by systemd, by the hive's report, and by each worker's own word.

    `hive_port` and `workers` (ports by name) say where they answer; tokens and authority are this host's own.
    """
    from concurrent.futures import ThreadPoolExecutor  # a fifth of this program's start, and used here alone

    authority = _text(f"{ETC}/secrets/ca.crt")
    hive = {"port": order["hive_port"], "token": _text(f"{ETC}/secrets/hive-token").strip(), "authority": authority}
    doors = {name: {"port": port, "token_of": name, "authority": authority} for name, port in order["workers"].items()}
    with ThreadPoolExecutor(max_workers=16) as pool:
        health = {name: pool.submit(_body, door, "/health") for name, door in doors.items()}
        report = _body(hive, "/v1/hive") if hive["port"] else {}
    return {
        "units": _unit_states([os.path.basename(path) for path in _unit_files()]),
        "current": os.path.basename(os.readlink(f"{OPT}/current")) if os.path.islink(f"{OPT}/current") else "",
        "hive": report,
        "health": {name: answer.result() for name, answer in health.items()},
    }


def _body(door: Order, path: str) -> dict[str, Any]:
    """Return what a service says, or nothing when it does not answer."""
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
        status, body = _ask(door, "GET", path, timeout_s=3.0)
        if status in (200, 503) and isinstance(body, dict):
            return body
    return {}


def call(order: Order) -> dict[str, Any]:
    """Call a service of this host over HTTP, for a controller that cannot reach its port."""
    try:
        status, body = _ask(order["door"], order["method"], order["path"], timeout_s=order.get("timeout_s", 5.0))
    except (ValueError, http.client.HTTPException) as problem:
        raise Failed(f"port {order['door']['port']}: {problem}") from None
    return {"status": status, "body": body}


def read(order: Order) -> dict[str, Any]:
    """Return the text of a file, or nothing when there is none."""
    return {"text": _text(order["path"])}


def purge(order: Order) -> dict[str, Any]:
    """Stop and remove everything that rbee owns on this host; models only when they are asked for."""
    with _alone():
        units = [os.path.basename(path) for path in _unit_files()]
        users = _users_of(units)
        if units:
            _systemctl("disable", "--quiet", "--now", *units, check=False, timeout_s=120)
            # The end of the hive has started the lease again.
            _systemctl("stop", *units, check=False, timeout_s=120)
        for unit in units:
            _remove(f"{UNITS}/{unit}")
        _systemctl("daemon-reload", check=False)
        for unit in units:
            _systemctl("reset-failed", unit, check=False)
        kept = not order.get("models") and any(not name.startswith(".") for name in _names(MODELS))
        inside = [f"{LIB}/{name}" for name in _names(LIB)]
        gone = [ETC, OPT, *(path for path in inside if path != MODELS), MODEL_SUMS] if kept else [ETC, OPT, LIB]
        problems = [problem for path in gone for problem in _remove_tree(path)]
        for user in users:
            _run(["userdel", user], f"the user {user} cannot be removed")
        if problems:
            raise Failed("; ".join(problems[:5]))
        return {"units": units, "users": users, "kept": [MODELS] if kept else []}


def _users_of(units: list[str]) -> list[str]:
    """Return the users of these units that rbee itself has made: their home is its folder."""
    lines = [line for unit in units for line in _text(f"{UNITS}/{unit}").splitlines()]
    found = []
    for name in {line.partition("=")[2].strip() for line in lines if line.startswith("User=")}:
        with contextlib.suppress(KeyError):
            if pwd.getpwnam(name).pw_dir == LIB:
                found.append(name)
    return sorted(found)


def _remove_tree(path: str) -> list[str]:
    """Remove a file or a folder with all in it, and return the first thing that could not be removed."""
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
            if os.path.isdir(path):
                shutil.rmtree(path)  # says what it stumbles over, now that the rest is gone
        elif os.path.lexists(path):
            os.unlink(path)
    except OSError as problem:
        return [f"{problem.filename or path}: {problem.strerror}"]
    return []


# --- small things


def write(path: str, data: bytes, mode: int) -> None:
    """Write a file so that a reader sees the old bytes or the new ones, also after a crash."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        _remove(name)
        raise


def _backup(path: str) -> dict[str, Any] | None:
    if not os.path.isfile(path):
        return None
    status = os.stat(path)
    return {"data": _bytes(path), "mode": status.st_mode & 0o7777, "uid": status.st_uid, "gid": status.st_gid}


def _restore(path: str, backup: dict[str, Any] | None) -> None:
    if backup is None:
        _remove(path)
        return
    write(path, backup["data"], backup["mode"])
    os.chown(path, backup["uid"], backup["gid"])


def _own(path: str, owner: str) -> None:
    user = pwd.getpwnam(owner)
    os.chown(path, user.pw_uid, user.pw_gid)


def _uid(name: str) -> int | None:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def _mode(path: str) -> list[Any] | None:
    try:
        status = os.stat(path)
        return [status.st_mode & 0o7777, _user_name(status.st_uid)]
    except OSError:
        return None


def _user_name(uid: int) -> str:
    """Return a user's name, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _keeps_sockets(unit: str) -> bool:
    show = ["systemctl", "show", "--value", "--property=ActiveState,FileDescriptorStoreMax", unit]
    told = subprocess.run(show, capture_output=True, text=True, timeout=30).stdout.split()
    return "active" in told and any(word.isdigit() and int(word) > 0 for word in told)


def _is_active(unit: str) -> bool:
    return subprocess.run(["systemctl", "is-active", "--quiet", unit], timeout=30).returncode == 0


def _systemctl(*words: str, check: bool = True, timeout_s: float = 60) -> str:
    """Run systemctl; return its complaint, or nothing. Raises: Failed with `check`."""
    try:
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        complaint = f"systemctl {' '.join(words)} took longer than {timeout_s:g} s"
    else:
        complaint = (done.stderr.strip() or f"exit status {done.returncode}") if done.returncode else ""
    if complaint and check:
        raise Failed(f"systemctl {' '.join(words)}: {complaint}")
    return complaint


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise Failed(f"{what}: {done.stderr.strip() or done.returncode}")


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _text(path: str) -> str:
    return _bytes(path).decode("utf-8", "replace")


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


ORDERS: dict[str, Callable[[Order], Any]] = {
    order.__name__: order
    for order in (
        observe,
        lock,
        put,
        get,
        fetch,
        receive,
        transact,
        keep,
        collect,
        history,
        jobs,
        status,
        call,
        read,
        purge,
    )
}

if __name__ == "__main__":
    main()
