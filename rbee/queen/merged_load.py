"""What is going on in all server processes of a queen, from what each of them tells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from rbee.wire.load import HiveLoad, QueenLoad, QueueLoad, WorkerLoad


def merged(loads: Sequence[QueenLoad]) -> QueenLoad:
    """Return the load of all processes; the first is that of the process that was asked.

    Each counts its own jobs and tokens, so these are summed. What it has heard of the others' jobs at a worker may be
    a moment old; it counts where it is more, as that of other queens is.
    """
    first = loads[0]
    if len(loads) == 1:
        return first
    told = [{worker.id: worker for hive in load.hives for worker in hive.workers} for load in loads]
    return replace(
        first,
        window_s=max(load.window_s for load in loads),
        in_flight=sum(load.in_flight for load in loads),
        waiting=sum(load.waiting for load in loads),
        jobs_per_second=_sum(load.jobs_per_second for load in loads),
        tokens_per_second=_sum(load.tokens_per_second for load in loads),
        refused_per_second=_sum(load.refused_per_second for load in loads),
        retries_per_second=_sum(load.retries_per_second for load in loads),
        hives=[_hive(hive, told) for hive in first.hives],
        queues=_queues([queue for load in loads for queue in load.queues]),
    )


def _hive(hive: HiveLoad, told: Sequence[dict[str, WorkerLoad]]) -> HiveLoad:
    workers = [_worker(worker, [seen[worker.id] for seen in told if worker.id in seen]) for worker in hive.workers]
    return replace(hive, workers=workers)


def _worker(worker: WorkerLoad, seen: Sequence[WorkerLoad]) -> WorkerLoad:
    times = [one.ttft_ms for one in seen if one.ttft_ms]
    return replace(
        worker,
        in_flight=max(sum(one.in_flight - one.elsewhere for one in seen), *(one.in_flight for one in seen)),
        ejected=any(one.ejected for one in seen),
        tokens_per_second=_sum(one.tokens_per_second for one in seen),
        ttft_ms=round(sum(times) / len(times), 1) if times else 0.0,
    )


def _queues(queues: Sequence[QueueLoad]) -> list[QueueLoad]:
    found: dict[tuple[str, str], QueueLoad] = {}
    for queue in queues:
        known = found.setdefault((queue.model, queue.priority), replace(queue, waiting=0))
        found[queue.model, queue.priority] = replace(
            known,
            waiting=known.waiting + queue.waiting,
            longest_wait_s=max(known.longest_wait_s, queue.longest_wait_s),
        )
    return list(found.values())


def _sum(numbers: Iterable[float]) -> float:
    return round(sum(numbers), 2)
