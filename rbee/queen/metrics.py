"""What the queen counts of jobs, and everything that her Prometheus page tells."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.registry import Collector

from rbee import __version__
from rbee.errors import Forbidden, PolicyDenied, RateLimited, RbeeError
from rbee.queen.counting import CANCELLED, Counts, Distributions, Family, Names, Numbers, code_of
from rbee.queen.gauges import FleetGauges
from rbee.queen.job import BYTES_A_TOKEN, QUEUED
from rbee.queen.usage import possible

if TYPE_CHECKING:
    from rbee.queen.fleet import Fleet
    from rbee.queen.job import Job

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
WRITING = frozenset({"chat", "completion"})
"""Capabilities whose answers are tokens."""
MAX_MODELS, MAX_TIERS = 500, 50
TIMINGS = re.compile(rb'"(prompt_n|cache_n|predicted_n)"\s*:\s*(\d{1,12})')
SHORT_BYTES = 1024
"""An answer of so few bytes may be nothing but its counts."""
USAGE = re.compile(rb'"(prompt_tokens|input_tokens|completion_tokens|output_tokens)"\s*:\s*(\d{1,12})')


def read_usage(end: bytes, head: bytes = b"") -> tuple[int, int]:
    """Return the tokens read and written that the end of an answer tells of, and its head, 0 for what they do not."""
    told = {name: int(value) for part in (head, end) for name, value in _after(b'"usage"', part, USAGE)}
    if not told and len(end) < SHORT_BYTES:
        told = {name: int(value) for name, value in USAGE.findall(end)}
    if not told:
        # llama.cpp counts here even when the client asked for no usage in its stream.
        timings = {name: int(value) for name, value in _after(b'"timings"', end, TIMINGS)}
        return timings.get(b"prompt_n", 0) + timings.get(b"cache_n", 0), timings.get(b"predicted_n", 0)
    read = told.get(b"prompt_tokens", told.get(b"input_tokens", 0))
    return read, told.get(b"completion_tokens", told.get(b"output_tokens", 0))


def _after(key: bytes, text: bytes, pattern: re.Pattern[bytes]) -> list[tuple[bytes, bytes]]:
    """Return what a pattern finds from a key on: to search all of a stream's end takes its time."""
    at = text.find(key)
    return pattern.findall(text, at) if at >= 0 else []


class Totals:
    """What has happened in this process, in plain numbers that only grow."""

    __slots__ = ("jobs", "refused", "retries")

    def __init__(self) -> None:
        self.jobs = self.refused = self.retries = 0


class Metrics:
    """Counts jobs. Labels are endpoints, models that exist, and outcomes: a bounded set, whatever clients send."""

    def __init__(self, fleet: Fleet) -> None:
        self.registry = CollectorRegistry()
        self.totals = Totals()
        self._in_flight = Numbers("rbee_jobs_in_flight", "Jobs in the queen at present.", ())
        self._models = Names(MAX_MODELS, lambda name: name in fleet.models())
        self._tiers = Names(MAX_TIERS)
        self._jobs = Counts("rbee_jobs_total", "Jobs that ended.", ("endpoint", "model", "outcome"))
        self._cancelled = Counts(
            "rbee_jobs_cancelled_total", "Jobs whose client left or cancelled them, by what was done then.", ("phase",)
        )
        self._retries = Counts("rbee_job_retries_total", "Jobs sent to a second worker.", ())
        self._broken = Counts("rbee_streams_broken_total", "Streams that ended with an error event.", ("code",))
        self._tokens = Counts("rbee_tokens_total", "Tokens read and written.", ("model", "direction"))
        self._errors = Counts(
            "rbee_error_responses_total", "Requests that were answered with an error.", ("status", "code")
        )
        self._limited = Counts(
            "rbee_rate_limited_total", "Jobs refused because their key has used a limit.", ("tier", "limit")
        )
        self._denied = Counts(
            "rbee_policy_denied_total", "Jobs refused because of their key's models, region or tenant.", ("reason",)
        )
        self._waits = Distributions(
            "rbee_queue_wait_seconds",
            "From a request to its turn, of jobs that got one.",
            ("model", "priority"),
            SECONDS,
        )
        self._first = Distributions(
            "rbee_time_to_first_byte_seconds",
            "From a request to the first byte of its answer, of event streams.",
            ("endpoint", "model"),
            SECONDS,
        )
        self._duration = Distributions(
            "rbee_job_duration_seconds", "From a request to the end of its answer.", ("endpoint", "model"), SECONDS
        )
        self._families: list[Family] = [
            self._in_flight, self._jobs, self._cancelled, self._retries, self._broken, self._tokens, self._errors,
            self._limited, self._denied, self._waits, self._first, self._duration,
        ]  # fmt: skip
        build = Numbers("rbee_build_info", "The version that runs.", ("version",))
        build[__version__,] = 1
        self.show(build, FleetGauges(fleet))
        ProcessCollector(registry=self.registry)

    def show(self, *others: Collector | Family) -> None:
        """Also tell of other parts of the queen."""
        for other in others:
            if isinstance(other, Family):
                self._families.append(other)
            else:
                self.registry.register(other)

    def started(self, job: Job) -> None:
        """Count a job in."""
        self._in_flight[()] += 1

    def granted(self, job: Job) -> None:
        """Note how long a job waited for its turn."""
        waited_s = time.monotonic() - job.received_at
        self._waits[self._models.label(job.request.model), job.priority].observe(waited_s)

    def first_byte(self, job: Job) -> None:
        """Note how long a job waited for its answer to begin."""
        if job.stream:
            took_s = time.monotonic() - job.received_at
            self._first[job.path, self._models.label(job.request.model)].observe(took_s)

    def ended(self, job: Job, outcome: str) -> None:
        """Count a job out. `outcome` is ok, cancelled, or an error's code."""
        self._in_flight[()] -= 1
        self.totals.jobs += 1
        model = self._models.label(job.request.model)
        self._jobs[job.path, model, outcome] += 1
        self._duration[job.path, model].observe(time.monotonic() - job.received_at)
        if outcome == CANCELLED:
            self._cancelled[job.phase,] += 1

    def never_begun(self, number: int) -> None:
        """Count jobs that were cancelled before they were taken from the records."""
        self._cancelled[QUEUED,] += number

    def turned_away(self, job: Job, problem: BaseException) -> None:
        """Count what policy or a key's limits kept from running."""
        if isinstance(problem, RateLimited):
            self._limited[self._tiers.label(job.caller.policy.tier), problem.limit] += 1
        elif isinstance(problem, PolicyDenied):
            self._denied[problem.reason,] += 1
        elif isinstance(problem, Forbidden):
            self._denied["model",] += 1

    def retried(self, job: Job) -> None:
        """Count a second attempt."""
        self._retries[()] += 1
        self.totals.retries += 1

    def broken(self, job: Job, problem: RbeeError) -> None:
        """Count a stream that could not be ended well."""
        self._broken[code_of(problem),] += 1

    def refused(self, problem: RbeeError) -> None:
        """Count a request that was answered with an error."""
        self._errors[str(problem.status), code_of(problem)] += 1
        self.totals.refused += 1

    def count_usage(self, job: Job, data: bytes, head: bytes = b"", events: int = 0, *, whole: bool = True) -> None:
        """Read the usage from the end of an answer, where engines put it; Anthropic's streams tell a part in `head`.

        It is estimated of an answer that is not whole, and of one that tells nothing: most engines do so only where
        the client asked for it (`stream_options.include_usage`). Then each of the `events` of a stream is a token.
        """
        read, written = read_usage(data[-8192:], head[:2048])
        if not (read or written) or (written < events and not whole):
            job.usage_estimated = True
            read = read or job.request.prompt_bytes() // BYTES_A_TOKEN
            if job.request.capability in WRITING:
                written = events if head else len(data) // BYTES_A_TOKEN
        job.prompt_tokens, job.completion_tokens = possible(job, read, written)
        job.usage_estimated |= (job.prompt_tokens, job.completion_tokens) != (read, written)
        model = self._models.label(job.request.model)
        if job.prompt_tokens:
            self._tokens[model, "in"] += job.prompt_tokens
        if job.completion_tokens:
            self._tokens[model, "out"] += job.completion_tokens

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        counted = "".join(family.text() for family in self._families)
        return counted.encode() + generate_latest(self.registry)
