"""pyinfra operations of rbee's own, for `deploys/`: few round trips, and each a transaction on the host."""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import chain
from pathlib import Path
from typing import Any

from pyinfra import host
from pyinfra.api import FunctionCommand, operation

from rbee.apply.plan import HostPlan, Packages, Upload
from rbee.apply.release import stream
from rbee.apply.ssh import Session
from rbee.apply.templates import shipped_text
from rbee.errors import HostFailed, HostProblem

TRANSACTION_LIMIT_S = 1200.0
"""The longest silence of a transaction: a model that loads. The agent bounds each start by the unit's own limit."""
Commands = Generator[FunctionCommand, None, None]


def planned() -> HostPlan:
    """Return this host's plan: the one that `rbee apply` brought along, or one that is made now."""
    brought: HostPlan | None = host.data.get("rbee_plan")
    return brought or _plan_now()


@operation()
def packages(sent: Packages | None) -> Commands:
    """Send the layers of a release that the host lacks, and put the release in place."""
    if sent is None:
        host.noop("the release is there")
        return
    yield FunctionCommand(_call, [_send_release, sent], {})


@operation()
def models(uploads: list[Upload]) -> Commands:
    """Bring model files to the host, each checked by its SHA-256."""
    if not uploads:
        host.noop("every model is there")
    for upload in uploads:
        yield FunctionCommand(_call, [_send_model, upload], {})


@operation()
def transaction(order: dict[str, Any] | None) -> Commands:
    """Have the agent carry out one role's order, or bring back what was before it."""
    if order is None:
        host.noop("nothing differs")
        return
    yield FunctionCommand(_call, [_transact, order], {})


def _call(state: Any, host: Any, function: Callable[[Any, Any], None], value: Any) -> bool:
    """Run a step; a problem is told as an event, for pyinfra would print a traceback."""
    try:
        function(host.connector, value)
    except Exception as problem:  # noqa: BLE001  whatever it is, it is told, and this host's apply ends
        what = problem.what if isinstance(problem, HostProblem) else f"{type(problem).__name__}: {problem}"
        code = getattr(problem, "code", None) or "host_failed"
        host.connector.problem = code
        host.connector.event({"event": "problem", "what": what, "hint": getattr(problem, "hint", None), "code": code})
        return False
    return True


def _send_release(connector: Any, sent: Packages) -> None:
    session: Session = connector.session
    source, pieces = shipped_text("unpack.py"), stream(sent.release, sent.lacking)
    head = next(pieces)
    size = len(head) + sent.size_bytes
    session.send("receive", chain([head], pieces), size, source=source, size_bytes=size, event=connector.event)


def _send_model(connector: Any, upload: Upload) -> None:
    session: Session = connector.session
    way, _, place = upload.source.partition(":")
    event = _named(connector.event, upload.name)
    if way == "file":
        with Path(place).open("rb") as file:
            session.put(upload.path, file, upload.size_bytes, upload.sha256, event=event)
    elif way == "host":
        other, _, path = place.partition(":")
        with connector.ssh.session(connector.host.data.rbee_hosts[other]) as holder:
            session.put(upload.path, Chunks(holder.chunks(path)), upload.size_bytes, upload.sha256, event=event)
    elif way == "https":
        session.ask("fetch", url=upload.source, path=upload.path, sha256=upload.sha256, event=event)
    else:
        raise HostFailed(connector.host.name, f"the model {upload.name} has a source that is not known here: {way}:")


def _transact(connector: Any, order: dict[str, Any]) -> None:
    connector.session.ask("transact", limit_s=TRANSACTION_LIMIT_S, event=connector.event, **order)


def _named(event: Callable[[dict[str, Any]], None], name: str) -> Callable[[dict[str, Any]], None]:
    return lambda told: event({**told, "name": name})


class Chunks:
    """An iterator of bytes that is read like a file."""

    def __init__(self, chunks: Any) -> None:
        self._chunks = chunks

    def read(self, size: int, /) -> bytes:
        """Return the next piece, or nothing at the end."""
        return next(self._chunks, b"")


def _plan_now() -> HostPlan:
    from rbee.apply.identity import identity_of
    from rbee.apply.survey import Survey, revision_of

    if "rbee_now" not in host.host_data:
        fleet, declared = host.data.rbee_fleet, host.data.rbee_host
        session: Session = host.connector.session  # type: ignore[attr-defined]  # the @rbee connector's
        session.ask("lock", who="pyinfra")
        survey = Survey(fleet, identity_of(fleet.folder), revision_of(fleet.folder))
        survey.observe(declared, session)
        host.host_data["rbee_now"] = survey.plan(declared)
    made: HostPlan = host.host_data["rbee_now"]
    return made
