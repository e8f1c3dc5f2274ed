"""Traces of jobs for an OpenTelemetry collector; imported only where they are wanted.

A job's spans are made when it has ended, from the times that it noted on its way, so that a running job costs an id.
They are encoded and sent by a thread. The SDK's own batch processor would be a greenlet here: what it encodes holds
every stream up, and its lock has stopped whole servers under gevent (opentelemetry-python#3886, #4025).
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, NoReturn

import gevent
from gevent.threadpool import ThreadPool
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.trace.status import Status, StatusCode

from rbee import __version__
from rbee.errors import RbeeError
from rbee.logs import clip
from rbee.queen.counting import CANCELLED, Counts, outcome_of
from rbee.queen.job import DECODE, PREFILL, WHOLE, Job

log = logging.getLogger("rbee.queen.tracing")

TRACES_PATH = "/v1/traces"
LAST_S = 3.0
"""How long a process that ends waits for its last spans to be sent."""
OPERATIONS = {"chat": "chat", "completion": "text_completion", "embedding": "embeddings"}
"""What OpenTelemetry's conventions for generative AI call capabilities; others keep their own names."""
SCOPE = InstrumentationScope("rbee.queen", __version__)
FAILED = Status(StatusCode.ERROR)

Attributes = dict[str, str | int | float | bool]
Phases = Sequence[tuple[str, float]]


class Trace:
    """Where a job stands in its trace. `attempts` are the span ids of its ways to workers, in their order."""

    __slots__ = ("_new_id", "attempts", "context", "model", "parent")

    def __init__(self, context: SpanContext, parent: SpanContext | None, new_id: Callable[[], int]) -> None:
        self.context = context
        self.parent = parent
        self.attempts: list[int] = []
        self.model = ""
        self._new_id = new_id

    def headers(self, model: str) -> dict[str, str]:
        """Return the headers that make a worker's spans children of the next attempt (W3C Trace Context).

        `model` is the model's name there, when it is another.
        """
        self.model = model
        self.attempts.append(self._new_id())
        context = self.context
        made = {"traceparent": f"00-{context.trace_id:032x}-{self.attempts[-1]:016x}-{context.trace_flags:02x}"}
        if context.trace_state:
            made["tracestate"] = context.trace_state.to_header()
        return made


class Ended(NamedTuple):
    """What is kept of a job until its spans are sent. Times are of the monotonic clock, `clock` is its zero."""

    trace: Trace
    name: str
    attributes: Attributes
    failed: bool
    phases: Phases
    began_at: float
    ended_at: float
    clock: float


class Tracing:
    """Makes and sends the spans of jobs. `endpoint` is a collector's address; empty: as $OTEL_EXPORTER_OTLP_* say.

    Sampling, resource, headers and timeouts are those of OpenTelemetry's environment variables, as are the bounds of
    what waits to be sent (OTEL_BSP_*); of more, the oldest is dropped.
    """

    def __init__(self, endpoint: str = "", exporter: SpanExporter | None = None) -> None:
        own = Resource({"service.name": "rbee-queen", "service.version": __version__})
        provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._resource, self._sampler, self._ids = provider.resource, provider.sampler, provider.id_generator
        self._exporter = exporter or OTLPSpanExporter(_traces_url(endpoint))
        self._propagator = TraceContextTextMapPropagator()
        self._waiting: deque[Ended] = deque(maxlen=_number("OTEL_BSP_MAX_QUEUE_SIZE", 2048))
        self._at_once = _number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512)
        self._every_s = _number("OTEL_BSP_SCHEDULE_DELAY", 5000) / 1000
        self._pool = ThreadPool(1)
        self.dropped = Counts("rbee_traces_dropped_total", "Traces that the collector did not take in time.", ())

    def begin(self, job: Job, environ: Mapping[str, str] = {}) -> None:
        """Give a job its place in the trace that its client names (W3C Trace Context), or in a new one."""
        told = {name: environ[key] for name, key in CARRIED if key in environ}
        around = self._propagator.extract(told) if told else None
        found = get_current_span(around).get_span_context() if around is not None else None
        parent = found if found is not None and found.is_valid else None
        trace_id = parent.trace_id if parent else self._ids.generate_trace_id()
        sampled = self._sampler.should_sample(around, trace_id, "job", SpanKind.SERVER)
        flags = TraceFlags(TraceFlags.SAMPLED if sampled.decision is Decision.RECORD_AND_SAMPLE else TraceFlags.DEFAULT)
        new_id = self._ids.generate_span_id
        job.trace = Trace(SpanContext(trace_id, new_id(), False, flags, sampled.trace_state), parent, new_id)

    def ended(self, job: Job, problem: BaseException | None) -> None:
        """Keep what is to be told of a job that ended; `problem` is what ended it, None when it was answered."""
        trace, job.trace = job.trace, None
        if trace is None or not trace.context.trace_flags.sampled:
            return
        if len(self._waiting) == self._waiting.maxlen:
            self.dropped[()] += 1
        now, attributes = time.monotonic(), _attributes(job, trace, problem)
        name = f"{attributes['gen_ai.operation.name']} {attributes['gen_ai.request.model']}"
        # A job that runs again begins its list of phases anew.
        phases, failed = tuple(job.phases), _is_failure(problem)
        self._waiting.append(Ended(trace, name, attributes, failed, phases, job.received_at, now, time.time() - now))

    def run(self) -> NoReturn:
        """Send for ever what has ended."""
        atexit.register(self.close)
        while True:
            gevent.sleep(self._every_s)
            self.flush()

    def flush(self) -> None:
        """Send what has ended so far, in a thread; a collector that does not answer holds up nothing else."""
        while self._waiting:
            batch = self._batch()
            if not self._pool.apply(self._send, (batch,)):
                self.dropped[()] += len(batch)

    def close(self) -> None:
        """Send the last spans, for at most `LAST_S`."""
        if self._waiting:
            gevent.with_timeout(LAST_S, self.flush, timeout_value=None)

    def _batch(self) -> list[Ended]:
        return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._at_once))]

    def _send(self, batch: Sequence[Ended]) -> bool:
        try:
            result = self._exporter.export([span for ended in batch for span in self._spans(ended)])
        except Exception:
            log.exception("%d traces were lost", len(batch))
            return False
        return result is SpanExportResult.SUCCESS

    def _spans(self, ended: Ended) -> Iterator[ReadableSpan]:
        """Yield a job's span and its children: one a phase, and one around each attempt at a worker."""
        trace = ended.trace
        failed = ended.failed
        yield self._span(ended, ended.name, ended.began_at, ended.ended_at, trace.context, trace.parent,
                         kind=SpanKind.SERVER, attributes=ended.attributes, failed=failed)  # fmt: skip
        times = [*ended.phases, ("", ended.ended_at)]
        attempts = iter(trace.attempts)
        around = trace.context
        for number, ((phase, began_at), (_, ended_at)) in enumerate(pairwise(times)):
            if phase in (PREFILL, WHOLE):
                around = self._child(trace.context, next(attempts, None))
                until, last = _end_of_attempt(times, number)
                attributes = {"rbee.worker.id": ended.attributes["rbee.worker.id"]} if last else {}
                yield self._span(ended, "worker", began_at, until, around, trace.context,
                                 kind=SpanKind.CLIENT, attributes=attributes, failed=failed or not last)  # fmt: skip
            elif phase != DECODE:
                around = trace.context
            yield self._span(ended, phase, began_at, ended_at, self._child(trace.context), around)

    def _child(self, context: SpanContext, span_id: int | None = None) -> SpanContext:
        span_id = span_id or self._ids.generate_span_id()
        return SpanContext(context.trace_id, span_id, False, context.trace_flags, context.trace_state)

    def _span(
        self,
        ended: Ended,
        name: str,
        began_at: float,
        ended_at: float,
        context: SpanContext,
        parent: SpanContext | None,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = {},
        failed: bool = False,
    ) -> ReadableSpan:
        start, end = (round((at + ended.clock) * 1e9) for at in (began_at, ended_at))
        return ReadableSpan(
            name,
            context,
            parent,
            self._resource,
            attributes,
            kind=kind,
            status=FAILED if failed else Status(),
            start_time=start,
            end_time=max(start, end),
            instrumentation_scope=SCOPE,
        )


CARRIED = (("traceparent", "HTTP_TRACEPARENT"), ("tracestate", "HTTP_TRACESTATE"))


def _is_failure(problem: BaseException | None) -> bool:
    """Return True when it is the server's: a span of a server whose client was wrong, or left, has no status."""
    return problem is not None and outcome_of(problem) != CANCELLED and getattr(problem, "status", 500) >= 500


def _status(job: Job, problem: BaseException | None) -> int:
    """Return the status that the client was told; a stream that breaks off had a good one."""
    if problem is None or job.phase == DECODE:
        return 200
    return problem.status if isinstance(problem, RbeeError) else 499 if outcome_of(problem) == CANCELLED else 500


def _attributes(job: Job, trace: Trace, problem: BaseException | None) -> Attributes:
    """Return what is told of a job, by the conventions for HTTP servers and for generative AI; never its text."""
    model, capability, outcome = clip(job.request.model), job.request.capability, outcome_of(problem)
    told: Attributes = {
        "http.request.method": "POST",
        "http.response.status_code": _status(job, problem),
        "http.route": job.path,
        "url.path": job.path,
        "gen_ai.operation.name": OPERATIONS.get(capability, capability),
        "gen_ai.provider.name": "rbee",
        "gen_ai.request.model": model,
        "gen_ai.request.stream": job.stream,
        "rbee.job.id": job.id,
        "rbee.job.outcome": outcome,
        "rbee.job.attempts": job.attempts,
        "rbee.job.priority": job.priority,
        "rbee.key.id": job.caller.id,
        "rbee.tenant": job.tenant,
        "rbee.worker.id": job.worker_id,
    }
    if most := job.request.output_limit():
        told["gen_ai.request.max_tokens"] = most
    if job.worker_id:
        told["gen_ai.response.model"] = trace.model or model
        told["gen_ai.usage.input_tokens"] = job.prompt_tokens
        told["gen_ai.usage.output_tokens"] = job.completion_tokens
    if len(job.phases) > 1:
        told["rbee.queue.wait_s"] = round(job.phases[1][1] - job.received_at, 6)
    if outcome != "ok":
        told["error.type"] = outcome
    return told


def _end_of_attempt(times: Phases, number: int) -> tuple[float, bool]:
    """Return when the attempt ends that begins with this phase, and whether it is the last."""
    after = number + 2 if times[number + 1][0] == DECODE else number + 1
    return times[after][1], after == len(times) - 1


def _traces_url(endpoint: str) -> str | None:
    """Return where spans go: a collector's address is given without the path of each signal."""
    if not endpoint:
        return None
    return endpoint if endpoint.endswith(TRACES_PATH) else endpoint.rstrip("/") + TRACES_PATH


def _number(name: str, default: int) -> int:
    """Return a number of OpenTelemetry's environment variables; one that is none counts as not set."""
    told = os.environ.get(name, "")
    return int(told) if told.isdigit() and int(told) else default
