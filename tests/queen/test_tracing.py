"""Traces of jobs, as a collector gets them: over OTLP/HTTP, from a real queen."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from job_calls import CHAT, call, ended, post_job
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from queen_rig import FleetFolder, free_port, settings_file, until_state

from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, end, running_queen, until

CANARY = "the canary in the prompt"
HONEY = {"model": "honey", "messages": [{"role": "user", "content": CANARY}]}
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50"}


@dataclass
class Collector:
    """Receives OTLP over HTTP; while `hangs` is set it answers nobody."""

    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    hangs: threading.Event = field(default_factory=threading.Event)
    asked: int = 0
    url: str = ""

    def take(self, headers: dict[str, str], body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        self.headers = headers
        self.bodies.append(body)
        for group in request.resource_spans:
            self.resources.append({one.key: one.value.string_value for one in group.resource.attributes})
            self.spans += [span for scope in group.scope_spans for span in scope.spans]

    def of_job(self, job: str) -> list[Span]:
        """Return the spans of a job's trace, once they are here, its own first."""
        until(lambda: self._root(job), f"the spans of {job}")
        root = self._root(job)
        assert root is not None
        return [root, *(one for one in self.spans if one.trace_id == root.trace_id and one is not root)]

    def _root(self, job: str) -> Span | None:
        return next((span for span in list(self.spans) if told(span).get("rbee.job.id") == job), None)


@contextlib.contextmanager
def running_collector() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.asked += 1
            body = self.rfile.read(int(self.headers["Content-Length"]))
            while collector.hangs.is_set():
                time.sleep(0.05)
            assert self.path == "/v1/traces"
            collector.take({name.lower(): value for name, value in self.headers.items()}, body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    collector.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield collector
    finally:
        collector.hangs.clear()
        server.shutdown()
        thread.join()
        server.server_close()


def told(span: Span) -> dict[str, Any]:
    """Return a span's attributes."""
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in span.attributes}


def dropped(queen: RunningQueen) -> float:
    page = queen.client.send("GET", "/metrics").read().decode()
    [line] = [line for line in page.splitlines() if line.startswith("rbee_traces_dropped_total ")]
    return float(line.split()[1])


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


@contextlib.contextmanager
def serving(server: RunningServer, folder: Path, *more: str, env: dict[str, str]) -> Iterator[RunningQueen]:
    fleet = FleetFolder(folder / "inventory")
    fleet.write(desk=["HivePort none", f"Worker says model=honey url={server.url} upstream-model=honey-2"])
    with running_queen("--no-hive", "--inventory", str(fleet.folder), *more, env=env) as queen:
        until_state(queen, "desk", "ready")
        yield queen


@pytest.fixture(scope="module")
def queen(
    server: RunningServer, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningQueen]:
    env = {**SOON, "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test", "OTEL_EXPORTER_OTLP_HEADERS": "x-key=k"}
    with serving(server, tmp_path_factory.mktemp("queen"), "--otlp-endpoint", collector.url, env=env) as running:
        yield running


def test_a_stream_is_a_span_with_its_phases(queen: RunningQueen, collector: Collector, server: RunningServer) -> None:
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=told"}
    with contextlib.closing(connection):
        connection.request("POST", CHAT, json.dumps({**HONEY, "stream": True, "max_tokens": 9}), headers)
        answer = connection.getresponse()
        job = str(answer.getheader("X-Rbee-Job"))
        answer.read()
    root, *children = collector.of_job(job)
    assert (root.name, root.kind) == ("chat honey", Span.SPAN_KIND_SERVER)
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, SPAN)
    assert root.trace_state == "vendor=told"
    assert root.status.code == Status.STATUS_CODE_UNSET
    facts = told(root)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "honey",
        "gen_ai.response.model": "honey-2",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 5,
        "http.route": CHAT,
        "rbee.job.attempts": 1,
        "rbee.job.outcome": "ok",
        "rbee.worker.id": "desk/says",
    }
    assert {name: facts.get(name) for name in expected} == expected
    assert facts["rbee.queue.wait_s"] >= 0
    [worker] = [span for span in children if span.kind == Span.SPAN_KIND_CLIENT]
    assert worker.parent_span_id == root.span_id
    assert server.told().traceparent == f"00-{TRACE}-{worker.span_id.hex()}-01"
    parents = {span.name: span.parent_span_id for span in children if span is not worker}
    inside, outside = worker.span_id, root.span_id
    assert parents == {"queued": outside, "routing": outside, "prefill": inside, "decode": inside}
    assert all(root.start_time_unix_nano <= one.start_time_unix_nano <= one.end_time_unix_nano for one in children)
    assert max(span.end_time_unix_nano for span in children) == root.end_time_unix_nano
    assert abs(root.end_time_unix_nano / 1e9 - time.time()) < 600
    resource = collector.resources[-1]
    assert (resource["service.name"], resource["deployment.environment"]) == ("rbee-queen", "test")
    assert collector.headers["x-key"] == "k"


def test_each_attempt_is_a_span(queen: RunningQueen, collector: Collector, server: RunningServer) -> None:
    server.behave(answer="drop")
    status, headers, _ = call(queen, "POST", CHAT, HONEY)
    server.behave(answer="ok")
    assert status == 502
    root, *children = collector.of_job(headers["x-rbee-job"])
    assert root.parent_span_id == b""
    assert root.status.code == Status.STATUS_CODE_ERROR
    assert (told(root)["error.type"], told(root)["rbee.job.attempts"]) == ("worker_lost", 2)
    assert told(root)["http.response.status_code"] == 502
    workers = [span for span in children if span.kind == Span.SPAN_KIND_CLIENT]
    assert [span.status.code for span in workers] == [Status.STATUS_CODE_ERROR] * 2
    assert sorted(span.name for span in children if span not in workers) == [
        "queued", "routing", "routing", "whole", "whole",
    ]  # fmt: skip


def test_a_job_of_the_background_has_a_trace_of_its_own(queen: RunningQueen, collector: Collector) -> None:
    job = post_job(queen, HONEY)
    assert ended(queen, job)["status"] == "completed"
    root, *children = collector.of_job(job)
    assert root.parent_span_id == b""
    assert {span.name for span in children} == {"queued", "routing", "worker", "whole"}


def test_what_is_refused_is_told_of_too(queen: RunningQueen, collector: Collector) -> None:
    _, headers, _ = call(queen, "POST", CHAT, {**HONEY, "model": "unknown"})
    [root, *children] = collector.of_job(headers["x-rbee-job"])
    assert told(root)["error.type"] == "model_not_found"
    assert told(root)["http.response.status_code"] == 404
    assert root.status.code == Status.STATUS_CODE_UNSET, "it is the client's mistake"
    assert {span.name for span in children} == {"queued", "routing"}


def test_what_the_client_does_not_sample_is_not_sent(
    queen: RunningQueen, collector: Collector, server: RunningServer
) -> None:
    unsampled = f"00-{TRACE[::-1]}-{SPAN}-00"
    assert call(queen, "POST", CHAT, HONEY, traceparent=unsampled)[0] == 200
    assert server.told().traceparent.startswith(f"00-{TRACE[::-1]}-")
    assert server.told().traceparent.endswith("-00")
    _, headers, _ = call(queen, "POST", CHAT, HONEY)
    collector.of_job(headers["x-rbee-job"])
    assert TRACE[::-1] not in {span.trace_id.hex() for span in collector.spans}


@pytest.mark.parametrize("damaged", ["x", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{SPAN}", "00-" + "f" * 5000])
def test_a_damaged_traceparent_begins_a_new_trace(queen: RunningQueen, collector: Collector, damaged: str) -> None:
    status, headers, _ = call(queen, "POST", CHAT, HONEY, traceparent=damaged)
    assert status == 200
    root = collector.of_job(headers["x-rbee-job"])[0]
    assert root.parent_span_id == b""
    assert root.trace_id.hex() not in (TRACE, "0" * 32)


def test_no_trace_holds_the_prompt(queen: RunningQueen, collector: Collector) -> None:
    _, headers, _ = call(queen, "POST", CHAT, HONEY)
    collector.of_job(headers["x-rbee-job"])
    assert not any(CANARY.encode() in body for body in collector.bodies)


def test_a_collector_that_hangs_holds_nobody_up_and_the_last_spans_are_sent(
    server: RunningServer, tmp_path: Path
) -> None:
    with running_collector() as collector:
        collector.hangs.set()
        env = {**SOON, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        with serving(server, tmp_path, env=env) as queen:
            assert call(queen, "POST", CHAT, HONEY)[0] == 200
            until(lambda: collector.asked, "the first spans to be under way")
            jobs = [call(queen, "POST", CHAT, HONEY)[1]["x-rbee-job"] for _ in range(20)]
            assert not collector.spans
            collector.hangs.clear()
            end(queen.process)
            assert queen.process.returncode == 0
        assert {told(span).get("rbee.job.id") for span in collector.spans} >= set(jobs)


def test_a_collector_that_hangs_does_not_keep_the_queen_from_ending(server: RunningServer, tmp_path: Path) -> None:
    with running_collector() as collector:
        collector.hangs.set()
        # `end` kills what has not ended by itself long before these times are over.
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_EXPORTER_OTLP_TIMEOUT": "600"}
        env |= {"OTEL_BSP_SCHEDULE_DELAY": "600000", "OTEL_BSP_MAX_QUEUE_SIZE": "2"}
        with serving(server, tmp_path, env=env) as queen:
            for _ in range(6):
                assert call(queen, "POST", CHAT, HONEY)[0] == 200
            until(lambda: dropped(queen) == 4, "the traces that have no room to be counted")
            end(queen.process)
            assert queen.process.returncode == 0
        assert collector.asked


def test_a_collector_that_is_not_there_is_no_trouble(server: RunningServer, tmp_path: Path) -> None:
    env = {**SOON, "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    fleet = FleetFolder(tmp_path / "inventory")
    fleet.write(desk=["HivePort none", f"Worker says model=honey url={server.url}"])
    settings = settings_file(tmp_path, fleet, otlp_endpoint=f"http://127.0.0.1:{free_port()}")
    with running_queen("--settings", settings, env=env) as queen:
        until_state(queen, "desk", "ready")
        for _ in range(5):
            assert call(queen, "POST", CHAT, HONEY)[0] == 200
        until(lambda: any("opentelemetry" in line for line in queen.log), "the log to tell of it")
        until(lambda: dropped(queen) >= 5, "the traces that were lost to be counted")
        assert call(queen, "POST", CHAT, HONEY)[0] == 200


def test_without_an_endpoint_nothing_of_it_is_imported() -> None:
    code = "import rbee.queen.app, rbee.queen.server, sys; print([m for m in sys.modules if 'opentelemetry' in m])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


def test_a_missing_package_is_said_before_the_queen_listens(tmp_path: Path) -> None:
    hidden = tmp_path / "opentelemetry" / "__init__.py"
    hidden.parent.mkdir()
    hidden.write_text("")
    with (
        pytest.raises(RuntimeError, match=r"pip install 'rbee\[otel\]'"),
        running_queen("--no-hive", "--otlp-endpoint", "http://x", env={"PYTHONPATH": str(tmp_path)}),
    ):
        pass
