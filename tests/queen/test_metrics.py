"""What the queen tells Prometheus of jobs, policy, the script and herself, and that no client can make it grow."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from job_calls import CHAT, call
from prometheus_client.parser import text_string_to_metric_families
from queen_rig import FleetFolder, free_port, until_state

from rbee.errors import RateLimited
from rbee.queen.access import LOCAL, Caller
from rbee.queen.client_watch import ClientWatch
from rbee.queen.counting import OTHER, Counts, Distributions, Names, code_of
from rbee.queen.fleet import Fleet
from rbee.queen.gauges import RecordsGauges
from rbee.queen.job import Job
from rbee.queen.keys import KeyStore
from rbee.queen.loop_lag import TICK_S, WINDOW_S, LoopLag
from rbee.queen.metrics import MAX_TIERS, Metrics
from rbee.queen.metrics_page import metrics_page
from rbee.queen.policy import Policy
from rbee.queen.records import Records
from rbee.queen.tenants import MAX_TENANTS, TenantMetrics
from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, running_queen, until
from rbee.wire.errors import decode_error
from rbee.wire.fleet import HiveReport, WorkerState
from rbee.wire.openai import decode

HONEY = {"model": "honey", "messages": [{"role": "user", "content": "one two three"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, server: RunningServer) -> FleetFolder:
    made = FleetFolder(tmp_path_factory.mktemp("fleet") / "inventory")
    made.write(
        desk=["HivePort none", "Region eu", f"Worker says model=honey url={server.url} slots=1"],
        vault=["HivePort none", "RbeeTenant acme", f"Worker own model=secret url={server.url} upstream-model=honey"],
        # Of another tenant: a host that is out of reach and may run a job makes it wait.
        away=["HostName 127.0.0.1", f"HivePort {free_port()}", "RbeeTenant acme"],
    )
    return made


@pytest.fixture(scope="module")
def queen(fleet: FleetFolder) -> Iterator[RunningQueen]:
    with running_queen("--no-hive", "--inventory", str(fleet.folder)) as running:
        for name in ("desk", "vault"):
            until_state(running, name, "ready")
        yield running


@pytest.fixture(autouse=True)
def _well(server: RunningServer) -> Iterator[None]:
    yield
    server.behave(answer="ok")


def page(queen: RunningQueen) -> str:
    return queen.client.send("GET", "/metrics").read().decode()


def metric(queen: RunningQueen, start: str) -> float:
    """Return the sum of the series that begin so."""
    return sum(float(line.rpartition(" ")[2]) for line in page(queen).splitlines() if line.startswith(start))


def key(queen: RunningQueen, name: str, policy: Policy) -> dict[str, str]:
    secret = KeyStore(queen.home / "state" / "keys.sqlite").create(name, policy=policy)[1]
    return {"Authorization": f"Bearer {secret}"}


@contextmanager
def asking(queen: RunningQueen, **fields: Any) -> Iterator[http.client.HTTPConnection]:
    """Send a job whose answer nobody takes; leaving the block is leaving it."""
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    with closing(connection):
        connection.request("POST", CHAT, json.dumps({**HONEY, **fields}))
        yield connection


def test_jobs_are_counted_by_what_they_were_and_how_they_ended(queen: RunningQueen) -> None:
    before = {name: metric(queen, name) for name in ("rbee_tokens_total", "rbee_queue_wait_seconds_count")}
    assert call(queen, "POST", CHAT, HONEY)[0] == 200
    with asking(queen, stream=True) as connection:
        assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
    job = 'endpoint="/v1/chat/completions",model="honey"'
    until(lambda: metric(queen, f'rbee_jobs_total{{{job},outcome="ok"}}') == 2, "both jobs to be counted")
    assert metric(queen, f"rbee_job_duration_seconds_count{{{job}}}") == 2
    assert metric(queen, f'rbee_job_duration_seconds_bucket{{{job},le="300.0"}}') == 2
    assert metric(queen, f"rbee_time_to_first_byte_seconds_count{{{job}}}") == 1, "of the stream alone"
    assert metric(queen, "rbee_tokens_total") - before["rbee_tokens_total"] == 12
    assert metric(queen, "rbee_queue_wait_seconds_count") - before["rbee_queue_wait_seconds_count"] == 2
    assert metric(queen, "rbee_jobs_in_flight ") == 0


def test_cancelled_jobs_are_counted_by_phase(queen: RunningQueen, server: RunningServer, fleet: FleetFolder) -> None:
    def cancelled(phase: str) -> float:
        return metric(queen, f'rbee_jobs_cancelled_total{{phase="{phase}"}}')

    server.behave(answer="hang")
    with asking(queen, stream=True):
        until(lambda: server.told().in_flight == 1, "the job to be at the server")
        with asking(queen):
            until(lambda: metric(queen, 'rbee_queue_jobs{model="honey"') == 1, "the second job to wait")
        until(lambda: cancelled("queued") == 1, "the job that waited to be counted")
    until(lambda: cancelled("prefill") == 1, "the job of which nothing came to be counted")
    jobs = server.told().jobs
    with asking(queen):
        until(lambda: server.told().jobs == jobs + 1, "the whole answer to be under way")
    until(lambda: cancelled("whole") == 1, "the whole answer to be counted")
    server.behave(answer="ok", word_s=600)
    with asking(queen, stream=True) as connection:
        assert connection.getresponse().readline().startswith(b": job ")
    until(lambda: cancelled("decode") == 1, "the stream to be counted")


def test_a_job_that_is_cancelled_while_its_model_loads_says_so(tmp_path: Path) -> None:
    fleet = FleetFolder(tmp_path / "inventory")
    with fleet.hive("bee") as hive:
        report = hive.client.get("/v1/hive", HiveReport)
        starting = msgspec.structs.replace(report.workers[0], state=WorkerState.STARTING)
        hive.change(workers=[msgspec.to_builtins(starting)])
        fleet.write(bee=hive.port)
        with running_queen("--no-hive", "--inventory", str(fleet.folder)) as queen:
            until_state(queen, "bee", "ready")
            with asking(queen, stream=True) as connection:
                assert connection.getresponse().readline().startswith(b": loading ")
            until(lambda: metric(queen, 'rbee_jobs_cancelled_total{phase="loading"}') == 1, "the job to be counted")
            # The load outlives the job.
            hive.change(workers=[msgspec.to_builtins(report.workers[0])])
            loaded = 'rbee_model_load_seconds_count{model="honey",outcome="ok"}'
            until(lambda: metric(queen, loaded) == 1, "the load to be counted")


def test_what_policy_and_limits_refuse_is_counted(queen: RunningQueen) -> None:
    bound = key(queen, "bound", Policy(models=("other-*",)))
    slow = key(queen, "slow", Policy(tier="free", requests_per_minute=1))
    assert call(queen, "POST", CHAT, HONEY, **bound)[0] == 403
    assert call(queen, "POST", CHAT, HONEY, X_Rbee_Region="us")[0] == 400
    assert call(queen, "POST", CHAT, {**HONEY, "model": "secret"})[0] == 400
    assert [call(queen, "POST", CHAT, HONEY, **slow)[0] for _ in range(2)] == [200, 429]
    for reason in ("model", "region", "tenant"):
        assert metric(queen, f'rbee_policy_denied_total{{reason="{reason}"}}') == 1
    assert metric(queen, 'rbee_rate_limited_total{limit="requests_per_minute",tier="free"}') == 1
    assert metric(queen, 'rbee_error_responses_total{code="forbidden",status="403"}') == 1
    assert metric(queen, 'rbee_error_responses_total{code="rate_limit_exceeded",status="429"}') == 1


def test_names_that_clients_make_up_are_one_series(queen: RunningQueen) -> None:
    for number in range(20):
        assert call(queen, "POST", CHAT, {**HONEY, "model": f"made-up-{number}"})[0] == 404
    assert "made-up" not in page(queen)
    assert metric(queen, f'rbee_jobs_total{{endpoint="{CHAT}",model="other",outcome="model_not_found"}}') == 20


def test_workers_and_hives_are_told_of_by_state(queen: RunningQueen, server: RunningServer) -> None:
    until_state(queen, "away", "unreachable")
    lines = page(queen).splitlines()
    assert 'rbee_worker_up{hive="desk",model="honey",worker="says"} 1.0' in lines
    assert 'rbee_worker_slots{hive="desk",model="honey",worker="says"} 1.0' in lines
    assert 'rbee_hive_up{hive="away"} 0.0' in lines
    assert 'rbee_hive_state{hive="away",state="unreachable"} 1.0' in lines
    assert not any('hive="desk"' in line for line in lines if line.startswith("rbee_hive_")), "it has no hive"


def test_the_script_and_the_inventory_are_told_of(queen: RunningQueen, fleet: FleetFolder) -> None:
    decisions = metric(queen, "rbee_script_decision_seconds_count")
    assert call(queen, "POST", CHAT, HONEY)[0] == 200
    assert metric(queen, "rbee_script_decision_seconds_count") == decisions + 1
    assert metric(queen, "rbee_script_valid ") == 1
    (fleet.folder / "scheduler.rhai").write_text("fn route_task(task, workers) {\n    workers[\n}")
    queen.client.send("POST", "/v1/orchestrator/scheduler/reload").read()
    assert (metric(queen, "rbee_script_valid "), metric(queen, "rbee_script_errors_total ")) == (0, 1)
    (fleet.folder / "scheduler.rhai").unlink()
    text = fleet.file.read_text()
    fleet.file.write_text(text.replace("says model=honey", "says model=honey modle=x"))
    until(lambda: metric(queen, "rbee_inventory_mistakes ") == 1, "the mistake to be told of")
    assert metric(queen, "rbee_inventory_valid ") == 0
    fleet.file.write_text(text)
    until(lambda: metric(queen, "rbee_inventory_valid ") == 1, "the inventory to be well again")


def test_the_process_and_its_event_loop_are_told_of(queen: RunningQueen) -> None:
    assert metric(queen, "process_resident_memory_bytes ") > 2**20
    assert metric(queen, "rbee_records_available ") == 1
    assert metric(queen, "rbee_event_loop_longest_lag_seconds ") < 60
    until(lambda: metric(queen, "rbee_event_loop_lag_seconds_count ") > 0, "the event loop to be watched")


def test_the_longest_lag_is_remembered_for_half_a_minute_and_then_forgotten() -> None:
    now = [0.0]
    lag = LoopLag(clock=lambda: now[0])

    def run(seconds: float) -> None:
        end = now[0] + seconds
        while now[0] < end:
            now[0] += TICK_S
            lag.tick()

    run(10)
    assert lag.longest_s == pytest.approx(0)
    now[0] += TICK_S + 0.3
    lag.tick()
    run(WINDOW_S / 2)
    assert lag.longest_s == pytest.approx(0.3)
    run(WINDOW_S)
    assert lag.longest_s == pytest.approx(0)


def test_an_engine_cannot_make_up_outcomes() -> None:
    answered = decode_error(500, b'{"error": {"message": "no", "code": "E-4711"}}')
    assert code_of(answered) == "upstream_error"
    assert code_of(decode_error(400, b'{"error": {"n_prompt_tokens": 9, "n_ctx": 8}}')) == "context_length_exceeded"


def test_labels_from_outside_are_bounded() -> None:
    names = Names(2, known=lambda name: name != "unknown")
    assert [names.label(name) for name in ("a", "unknown", "b", "c", "a")] == ["a", OTHER, "b", OTHER, "a"]


def test_tiers_and_tenants_of_tokens_cannot_make_the_page_grow(tmp_path: Path) -> None:
    metrics, tenants = Metrics(Fleet(tmp_path / "fleet.json", "")), TenantMetrics()
    for number in range(MAX_TENANTS + 50):
        made = job(Caller("jwt:x", "x", LOCAL.scopes, Policy(tenant=f"t{number}", tier=f"tier{number}")))
        metrics.turned_away(made, RateLimited("no", limit="concurrency"))
        tenants.started(made)
        tenants.ended(made, "ok")
    text = metrics_page(metrics, tenants).decode()
    assert text.count("rbee_rate_limited_total{") == MAX_TIERS + 1
    assert text.count("rbee_tenant_jobs_total{") == MAX_TENANTS + 1
    assert 'rbee_tenant_jobs_total{model="none",outcome="ok",tenant="other"} 50.0' in text
    assert b"t12" not in metrics_page(metrics, tenants, "t3")


def job(caller: Caller) -> Job:
    return Job(CHAT, decode(CHAT, json.dumps(HONEY).encode()), b"", caller, ClientWatch(None))


def samples(text: str) -> dict[tuple[str, str], float]:
    """Read a page as Prometheus' own client does: the values by name and labels."""
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(one.name, ",".join(f"{k}={v}" for k, v in sorted(one.labels.items()))): one.value for one in found}


def test_a_histogram_counts_up_to_and_with_each_bound() -> None:
    waits = Distributions("x_seconds", "x", ("model",), (0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 1.0, 7.0):
        waits["m",].observe(seconds)
    assert samples(waits.text()) == {
        ("x_seconds_bucket", "le=0.1,model=m"): 2,
        ("x_seconds_bucket", "le=1.0,model=m"): 4,
        ("x_seconds_bucket", "le=+Inf,model=m"): 5,
        ("x_seconds_count", "model=m"): 5,
        ("x_seconds_sum", "model=m"): pytest.approx(8.65),
    }


def test_a_counter_without_labels_is_there_before_it_counts() -> None:
    assert samples(Counts("x_total", "x", ()).text()) == {("x_total", ""): 0}


def test_labels_may_hold_anything() -> None:
    counts = Counts("x_total", "x", ("b", "a"))
    counts['say "hi"\n', "back\\slash"] += 2.5
    assert samples(counts.text()) == {("x_total", 'a=back\\slash,b=say "hi"\n'): 2.5}


def test_records_that_cannot_be_written_are_told_of(tmp_path: Path) -> None:
    with closing(Records(tmp_path / "records")) as records:
        records.problem = "the disk is full"
        [gauge] = RecordsGauges(records).collect()
        assert gauge.samples[0].value == 0
