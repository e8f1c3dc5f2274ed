"""The operator's API of the routing script: show, replace, reload, explain, and the decisions of late."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import falcon
import msgspec

from rbee import paths
from rbee.errors import InvalidRequest, SetupProblem
from rbee.plugin import Capability
from rbee.queen import body
from rbee.queen.script import compile_script
from rbee.queen.trial import capability_of, described
from rbee.queen.view import Query
from rbee.wire.scheduler import ExplainJob, Explanation, ReplaceScript, SchedulerView

if TYPE_CHECKING:
    from rbee.queen.app import Queen

DAY_S = 86400.0


class Scheduler:
    """The script in force."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._queen.access.operator(req.env)
        self._queen.script.follow()
        resp.data = msgspec.json.encode(view(self._queen))

    def on_put(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Put another script into force; one that does not compile changes nothing."""
        self._queen.access.operator(req.env)
        text = body.read_json(req, ReplaceScript).text
        script = self._queen.script
        compile_script(text, "script")
        try:
            paths.write_private(script.path, text.encode())
        except OSError as problem:
            raise SetupProblem(f"The queen cannot write {script.path} ({problem.strerror})") from None
        script.reload()
        resp.data = msgspec.json.encode(view(self._queen))


class Reload:
    """Read the script again at once."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._queen.access.operator(req.env)
        self._queen.script.reload()
        resp.data = msgspec.json.encode(view(self._queen))


class Explain:
    """Which worker a job would go to, and why."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._queen.access.operator(req.env)
        resp.data = msgspec.json.encode(explain(self._queen, body.read_json(req, ExplainJob)))


class Decisions:
    """The decisions of late, one JSON object a line; `since_s` says how far back."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._queen.access.operator(req.env)
        since_s = req.get_param_as_float("since_s", min_value=0.0, max_value=3650 * DAY_S, default=DAY_S)
        self._queen.decisions.flush()
        resp.content_type = "application/jsonl"
        resp.stream = self._queen.decisions.since(time.time() - since_s)


def view(queen: Queen) -> SchedulerView:
    """Return the script in force as it may be shown to its operator."""
    script = queen.script
    return SchedulerView(
        source=script.source,
        path=str(script.path),
        text=script.in_force.text,
        functions=sorted(script.in_force.functions),
        error=script.error,
        since=script.since,
        platform=queen.settings.platform,
    )


def explain(queen: Queen, wanted: ExplainJob) -> Explanation:
    """Decide for a job that is only described. Raises: InvalidRequest, UnknownModel, NotSupported, Busy."""
    capability = capability_of(wanted.capability)
    if capability is None:
        known = ", ".join(str(capability) for capability in Capability)
        raise InvalidRequest(f"{wanted.capability!r} is no capability; known: {known}", param="capability")
    query = Query(wanted.model, capability, frozenset(), wanted.hive or None, wanted.region, wanted.tenant)
    task = described(wanted, capability)
    seen, told = queen.routing.explain(query, task)
    return Explanation(
        chosen=[seen.places[index].id for index in told.decision.indices],
        by=told.decision.by,
        function=told.function,
        line=told.line,
        code=told.code,
        lines=told.lines[-100:],
        task=task,
        workers=[dict(worker) for worker in seen.frozen()],
        refused=queen.routing.refused(query),
        problem=told.decision.problem,
    )
