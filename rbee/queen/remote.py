"""Workers that rbee neither starts nor stops: the servers of the inventory's `Worker NAME url=…` lines.

Each is asked `GET /models` at its base address: every 10 s while nothing else shows that it answers, at once when a job
could not reach it, and with growing pauses, to 5 s, while it does not answer.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterable, Mapping
from typing import NoReturn
from urllib.parse import urlsplit

import gevent
import msgspec
from gevent.event import Event

from rbee.client import Client
from rbee.errors import RbeeError, TimedOut, Unreachable
from rbee.http.upstream import Upstream
from rbee.inventory.fleet import Host, WorkerLine
from rbee.plugin import Capability, Feature
from rbee.queen.fleet import Fleet
from rbee.queen.health import give_up
from rbee.queen.hives import Hive, Worker
from rbee.wire.fleet import EngineReport, HiveReport, ModelReport, WorkerReport, WorkerState

log = logging.getLogger("rbee.queen.remote")

BACKEND = "server"
SLOTS = 8
CAPABILITIES = [Capability.CHAT.value, Capability.COMPLETION.value, Capability.EMBEDDING.value]
FEATURES = [feature.value for feature in Feature]
"""All of them: only the server knows what it has, and it says so itself."""

ASK_EVERY_S = 10.0
PROBE_TIMEOUT_S, PROBE_BOUND_S = 5.0, 8.0
LATE_PROBES = 3
"""So many answers in a row that did not come in time mean an end; one may be late because the server is busy."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
MAX_LIST_BYTES = 8 * 1024 * 1024


class KeyFile:
    """A file that holds an API key; a new key is taken as soon as it is there."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._key = ""

    def key(self) -> str:
        """Return the key. Raises: Unreachable."""
        try:
            found = os.stat(self.path)
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if stamp != self._stamp:
                with open(self.path, encoding="ascii") as file:
                    self._key = file.read(8192).strip()
                self._stamp = stamp
        except (OSError, UnicodeDecodeError) as problem:
            why = getattr(problem, "strerror", None) or "it is no text"
            raise Unreachable(f"The key file {self.path} cannot be read ({why})") from None
        if not self._key or not self._key.isprintable() or " " in self._key:
            raise Unreachable(f"The key file {self.path} does not hold one API key")
        return self._key


class ServerUpstream(Upstream):
    """The connections to a server, at the base path of its address and with the key of the moment."""

    def __init__(self, line: WorkerLine) -> None:
        # What the OpenAI clients call a base URL ends in /v1; an address without any path means that one.
        super().__init__(line.url, base_path=urlsplit(line.url).path or "/v1")
        self._key_file = KeyFile(line.key_file) if line.key_file else None

    def _head(self, method: str, path: str, headers: Mapping[str, str], length: int) -> bytes:
        if self._key_file is not None:
            self.token = self._key_file.key()
        return super()._head(method, path, headers, length)


class Servers:
    """Keeps the servers of the inventory in the fleet's belief."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._known: dict[str, dict[str, Server]] = {}

    def follow(self, hosts: Iterable[Host]) -> None:
        """Believe in exactly the servers of these hosts; one whose line is another is met anew, the others stay."""
        found = {host.name: host for host in hosts if any(line.url for line in host.workers)}
        for name in self._known.keys() - found.keys():
            for server in self._known.pop(name).values():
                server.end()
            self._fleet.unserve(name)
        for name, host in found.items():
            self._known[name] = self._of_host(host, self._known.get(name, {}))

    def _of_host(self, host: Host, before: dict[str, Server]) -> dict[str, Server]:
        lines = {line.name: line for line in host.workers if line.url}
        kept = {name: server for name, server in before.items() if _same(lines.get(name), server.line)}
        for name in before.keys() - kept.keys():
            before[name].end()
        # In the order of the lines: a routing script may take the first.
        servers = {name: kept.get(name) or Server(self._fleet, host.name, line) for name, line in lines.items()}
        self._fleet.serve(group(host, servers.values()))
        for name in servers.keys() - kept.keys():
            servers[name].start()
        return servers


class Server:
    """One server: its worker, and the greenlet that finds out whether it answers."""

    def __init__(self, fleet: Fleet, host: str, line: WorkerLine) -> None:
        self.line = line
        self._fleet = fleet
        self._upstream = ServerUpstream(line)
        self.worker = Worker(
            host,
            report_of(line),
            self._upstream,
            self._upstream,
            # Nothing is sent there before it has answered.
            lost=True,
            ejection=fleet.ejection(host, line.name),
            upstream_model=line.upstream_model,
            look=self.look,
        )
        self._wake = Event()
        self._late = 0
        self._greenlet: gevent.Greenlet[[], NoReturn] | None = None

    def start(self) -> None:
        """Begin to ask."""
        self._greenlet = gevent.spawn(self._run)

    def look(self) -> None:
        """Ask now."""
        self._wake.set()

    def end(self) -> None:
        """Ask no more; jobs that run there end well."""
        if self._greenlet is not None:
            self._greenlet.kill(block=False)

    def _run(self) -> NoReturn:
        pause_s = FIRST_PAUSE_S
        while True:
            self._wake.clear()
            answers = self._ask()
            if answers:
                pause_s = FIRST_PAUSE_S
                self._rest()
            else:
                gevent.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _rest(self) -> None:
        """Wait until there is a reason to ask: a job that failed there, or that nothing was heard for long."""
        while not self._wake.wait(ASK_EVERY_S):
            if time.monotonic() - self.worker.ejection.answered_at > ASK_EVERY_S:
                return

    def _ask(self) -> bool:
        """Return True when the server answers, and note how it stands."""
        late = TimedOut(f"{self.line.url} does not answer within {PROBE_BOUND_S:g} s")
        try:
            with gevent.Timeout(PROBE_BOUND_S, late):
                doubt = self._probe()
        except TimedOut as problem:
            self._late += 1
            if self.worker.lost or self._late >= LATE_PROBES:
                # One that is late may only be busy, and be the only one.
                self._note(WorkerState.FAILED, str(problem), gone=self._fleet.has_other(self.worker))
            return False
        except RbeeError as problem:
            self._note(WorkerState.FAILED, str(problem), gone=isinstance(problem, Unreachable))
            return False
        except Exception as problem:
            log.exception("the server %s", self.worker.id)
            self._note(WorkerState.FAILED, f"Its answer is not understood ({problem})")
            return False
        self._late = 0
        self._note(WorkerState.READY, doubt)
        return True

    def _probe(self) -> str:
        """Return what is doubtful about a server that answers, or nothing. Raises: Lost, RbeeError."""
        answer = self._upstream.request("GET", "/v1/models", timeout_s=PROBE_TIMEOUT_S)
        try:
            body = answer.read(MAX_LIST_BYTES, PROBE_TIMEOUT_S)
        except ValueError as problem:
            raise RbeeError(str(problem)) from None
        if answer.status in (401, 403):
            hint = self.line.key_file or "key-file= on its Worker line"
            raise RbeeError(f"{self.line.url} refuses the API key ({answer.status})", hint=hint)
        if 300 <= answer.status < 400:
            raise RbeeError(
                f"{self.line.url} redirects ({answer.status})", hint="the address that it leads to, in url="
            )
        if answer.status >= 500:
            raise RbeeError(f"{self.line.url} answers {answer.status} to GET /models")
        # Some servers do not list their models, and all but the statuses above come from one that is there.
        return self._doubt(body) if answer.status == 200 else ""

    def _doubt(self, body: bytes) -> str:
        """Return a warning when a server's list lacks the model; it is no more: some take further names."""
        try:
            names = [str(card["id"]) for card in msgspec.json.decode(body)["data"]]
        except (msgspec.DecodeError, LookupError, TypeError):
            return ""
        wanted = self.line.upstream_model or self.line.model
        if not names or wanted in names or f"{wanted}:latest" in names:
            return ""
        shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
        return (
            f"{self.line.url} does not list the model {wanted!r}, but {shown}. Try: upstream-model= at {self.line.at}"
        )

    def _note(self, state: WorkerState, reason: str, *, gone: bool = False) -> None:
        """Note how it stands; jobs of which one that is `gone` has answered nothing are sent elsewhere."""
        worker, ready = self.worker, state is WorkerState.READY
        if gone:
            give_up(worker)
        if worker.report.state is state and worker.report.reason == reason and worker.lost is not ready:
            return
        if worker.report.state is not state:
            log.log(logging.INFO if ready else logging.WARNING, "the server %s is %s. %s", worker.id, state, reason)
            worker.report = msgspec.structs.replace(worker.report, state=state, since=time.time())
        worker.report = msgspec.structs.replace(worker.report, reason=reason)
        worker.lost = not ready
        self._fleet.announce()


def group(host: Host, servers: Iterable[Server]) -> Hive:
    """Return the servers of a host as the fleet holds workers: a hive that nobody can call."""
    workers = [server.worker for server in servers]
    able: dict[str, list[str]] = {}
    for worker in workers:
        able[worker.report.model] = sorted({*able.get(worker.report.model, []), *worker.report.capabilities})
    report = HiveReport(
        hive=host.name,
        url="",
        version="",
        epoch=0.0,
        sequence=0,
        engines=[EngineReport(name=BACKEND, capabilities=CAPABILITIES, features=FEATURES)],
        models=[ModelReport(name=model, capabilities=capabilities) for model, capabilities in able.items()],
    )
    nobody = Client("unix:")
    return Hive(report, nobody, 0.0, workers={worker.report.name: worker for worker in workers}, serves=host)


def report_of(line: WorkerLine) -> WorkerReport:
    """Return what the inventory says of a server, which nobody has asked yet."""
    return WorkerReport(
        name=line.name,
        model=line.model,
        backend=BACKEND,
        state=WorkerState.STARTING,
        device=BACKEND,
        capabilities=line.capabilities or CAPABILITIES,
        features=FEATURES,
        slots=line.slots or SLOTS,
        since=time.time(),
        started_at=time.time(),
        declared=True,
    )


def _same(line: WorkerLine | None, other: WorkerLine) -> bool:
    """Return True when two lines say the same, wherever they stand."""
    return line is not None and msgspec.structs.replace(line, at=other.at) == other
