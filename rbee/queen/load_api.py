"""`GET /v1/orchestrator/load`: what is going on at this moment, for `rbee top`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import falcon
import msgspec

from rbee import __version__
from rbee.queen.fleet import Fleet
from rbee.queen.hives import Worker
from rbee.queen.merged_load import merged
from rbee.queen.metrics import Totals
from rbee.queen.orchestrator import Resource, problems
from rbee.wire.fleet import Problem
from rbee.wire.load import HiveLoad, QueenLoad, QueueLoad, WorkerLoad

if TYPE_CHECKING:
    from rbee.queen.app import Queen

MAX_PROBLEMS = 20


class Load(Resource):
    """Everything at a glance, of all server processes of this queen together."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        sharing = self._queen.sharing
        if sharing is None:
            self._queen.access.operator(req.env)
            resp.data = msgspec.json.encode(load(self._queen))
            return
        from rbee.queen.peers import TOKEN_OF

        told = load(self._queen)
        if not sharing.peers.trusts(req.env.get(TOKEN_OF, "")):
            caller = self._queen.access.operator(req.env)
            answers, missing = sharing.peers.gather(sharing.peers.siblings(), req.path, caller)
            away = [Problem(where=name, message="It does not answer") for name in missing]
            others = [msgspec.json.decode(data, type=QueenLoad) for data in answers.values()]
            told = merged([msgspec.structs.replace(told, problems=[*told.problems, *away]), *others])
        resp.data = msgspec.json.encode(told)


def counts(fleet: Fleet, totals: Totals) -> dict[str, float]:
    """Return what only grows, by name: of this process, and the tokens of each worker by its id."""
    written = {worker.id: float(worker.tokens_written) for worker in _workers(fleet)}
    return {**written, "jobs": totals.jobs, "refused": totals.refused, "retries": totals.retries}


def load(queen: Queen) -> QueenLoad:
    """Return what is going on in this process."""
    rates, window_s = queen.rates.per_second()
    waits = queen.admission.queues.waits()
    return QueenLoad(
        version=__version__,
        url=f"http://{queen.settings.host}:{queen.settings.port}",
        pid=queen.master_pid,
        at=time.time(),
        started_at=queen.started_at,
        draining=queen.draining_since() is not None,
        window_s=round(window_s, 3),
        in_flight=queen.admission.in_flight,
        waiting=sum(wait[2] for wait in waits),
        jobs_per_second=_rounded(rates, "jobs"),
        tokens_per_second=round(sum(rates.get(worker.id, 0.0) for worker in _workers(queen.fleet)), 2),
        refused_per_second=_rounded(rates, "refused"),
        retries_per_second=_rounded(rates, "retries"),
        hives=_hives(queen.fleet, rates),
        queues=[
            QueueLoad(model=model, priority=priority, waiting=waiting, longest_wait_s=round(longest_s, 3))
            for model, priority, waiting, longest_s in waits
        ],
        problems=problems(queen)[:MAX_PROBLEMS],
    )


def _hives(fleet: Fleet, rates: Mapping[str, float]) -> list[HiveLoad]:
    workers: dict[str, list[WorkerLoad]] = {}
    for worker in _workers(fleet):
        workers.setdefault(worker.hive, []).append(_worker(worker, _rounded(rates, worker.id)))
    return [
        HiveLoad(
            hive=view.hive,
            state=view.state,
            reason=view.reason,
            region=view.region,
            devices=view.devices,
            workers=workers.get(view.hive, []),
        )
        for view in fleet.views()
    ]


def _worker(worker: Worker, tokens_per_second: float) -> WorkerLoad:
    report = worker.report
    return WorkerLoad(
        id=worker.id,
        model=report.model,
        backend=report.backend,
        device=report.device,
        state=report.state,
        slots=report.slots,
        in_flight=worker.in_flight,
        elsewhere=worker.elsewhere,
        ejected=worker.ejection.ejected,
        lost=worker.lost,
        tokens_per_second=tokens_per_second,
        ttft_ms=round(worker.ttft_ms, 1),
        progress=report.progress,
        reason=report.reason,
    )


def _workers(fleet: Fleet) -> list[Worker]:
    return [worker for hive in fleet.hives.values() for worker in hive.workers.values()]


def _rounded(rates: Mapping[str, float], name: str) -> float:
    return round(rates.get(name, 0.0), 2)
