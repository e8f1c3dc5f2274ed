"""The worker's counters, written in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import threading
from collections import Counter


class Metrics:
    """Counts of one worker. Every method may be called from any thread."""

    def __init__(self, model: str, backend: str) -> None:
        self._labels = f'model="{_escape(model)}",backend="{_escape(backend)}"'
        self._lock = threading.Lock()
        self._jobs: Counter[tuple[str, str]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._seconds = 0.0
        self.load_s = 0.0

    def finished(self, endpoint: str, status: str, seconds: float) -> None:
        """Count a job; `status` is the HTTP status, "cancelled" or "broken"."""
        with self._lock:
            self._jobs[endpoint, status] += 1
            self._seconds += seconds

    def tokens(self, prompt: int, generated: int) -> None:
        """Add the usage that an answer reported."""
        with self._lock:
            self._tokens["input"] += prompt
            self._tokens["output"] += generated

    def text(self, *, up: bool, in_flight: int, waiting: int) -> str:
        """Return the exposition."""
        with self._lock:
            jobs, tokens, seconds = dict(self._jobs), dict(self._tokens), self._seconds
        lines = _family("rbee_worker_up", "gauge", "1 when the worker takes jobs.", {self._labels: int(up)})
        lines += _family("rbee_worker_jobs_in_flight", "gauge", "Jobs being answered.", {self._labels: in_flight})
        lines += _family("rbee_worker_jobs_waiting", "gauge", "Jobs that wait for a slot.", {self._labels: waiting})
        lines += _family("rbee_worker_load_seconds", "gauge", "How long the load took.", {self._labels: self.load_s})
        by_status = {
            f'{self._labels},endpoint="{path}",status="{status}"': count for (path, status), count in jobs.items()
        }
        lines += _family("rbee_worker_jobs_total", "counter", "Jobs by endpoint and result.", by_status)
        lines += _family("rbee_worker_job_seconds_total", "counter", "Time spent on jobs.", {self._labels: seconds})
        by_direction = {f'{self._labels},direction="{way}"': tokens.get(way, 0) for way in ("input", "output")}
        lines += _family("rbee_worker_tokens_total", "counter", "Tokens that answers reported.", by_direction)
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, text: str, values: dict[str, int] | dict[str, float]) -> list[str]:
    lines = [f"{name}{{{labels}}} {value}" for labels, value in values.items()]
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *lines]


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
