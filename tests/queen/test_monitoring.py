"""The shipped alert rules, scrape example and dashboard, on a real Prometheus that scrapes a real queen.

Where Debian's `prometheus` is not installed these tests are skipped; RBEE_REQUIRE_HOSTS=1 makes that a failure.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import yaml
from job_calls import CHAT, call
from queen_rig import FleetFolder, free_port, settings_file, until_state

from rbee.queen.keys import INFERENCE, METRICS, KeyStore
from rbee.queen.merged_metrics import SharedGauges
from rbee.queen.policy import NO_LIMITS, Policy
from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, end, running_queen, until
from rbee.wire.gitops import GitopsState, GitopsStatus

ROOT = Path(__file__).resolve().parent.parent.parent
SHIPPED = ROOT / "docs" / "monitoring"
RULES, SCRAPE, DASHBOARD = SHIPPED / "rbee.rules.yml", SHIPPED / "prometheus.yml", SHIPPED / "grafana-dashboard.json"
METRIC = re.compile(r"\b(?:rbee|process)_[a-z_]+\b|\bup\b")
OF_PROMETHEUS = {"up"}
HONEY = {"model": "honey", "messages": [{"role": "user", "content": "one two three"}]}
WORKER = 'hive="desk",worker="says",model="honey"'


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        absent = pytest.fail if os.environ.get("RBEE_REQUIRE_HOSTS") == "1" else pytest.skip
        absent(f"{name} is not installed; Debian has it in the package prometheus")
    return found


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    board: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in board if panel["type"] != "row"]


def queries() -> dict[str, list[str]]:
    """Return the queries of every panel, with Grafana's variables filled in."""
    filled = {"$__rate_interval": "30s", "$instance": ".*", "$model": ".*"}
    found: dict[str, list[str]] = {}
    for panel in panels():
        for target in panel["targets"]:
            query: str = target["expr"]
            for name, value in filled.items():
                query = query.replace(name, value)
            assert "$" not in query, f"{panel['title']}: an unknown variable in {query}"
            found.setdefault(panel["title"], []).append(query)
    return found


@dataclass
class Prometheus:
    """A running Prometheus."""

    port: int

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer. Raises: AssertionError when it is no success."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("GET", f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
            answer = json.loads(connection.getresponse().read())
        assert answer["status"] == "success", answer
        return answer["data"]

    def result(self, query: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("query", query=query)["result"]
        return found

    def alerts(self) -> dict[str, str]:
        """Return the alerts that are pending or firing."""
        return {alert["labels"]["alertname"]: alert["state"] for alert in self.get("alerts")["alerts"]}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


@pytest.fixture(scope="module")
def queen(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningQueen]:
    """Return a queen as `rbee apply` sets one up, with a reconciler, that asks everybody for a key."""
    place = tmp_path_factory.mktemp("queen")
    fleet = FleetFolder(place / "inventory")
    fleet.write(desk=["HivePort none", f"Worker says model=honey url={server.url}"], away=free_port())
    gitops = place / "gitops"
    gitops.mkdir()
    status = GitopsStatus(revision="a", wanted="a", state=GitopsState.CONVERGED, checked_at=time.time(), hosts={})
    (gitops / "status.json").write_bytes(msgspec.json.encode(status))
    with running_queen("--settings", settings_file(place, fleet, gitops=str(gitops), require_key=True)) as running:
        until_state(running, "desk", "ready")
        yield running


def key(queen: RunningQueen, name: str, scope: str, policy: Policy = NO_LIMITS) -> str:
    store = KeyStore(queen.home / "state" / "keys.sqlite")
    return store.create(name, scopes=frozenset({scope}), policy=policy)[1]


@pytest.fixture(scope="module")
def worked(queen: RunningQueen) -> None:
    """Have everything happen that leaves a trace: answers, streams, refusals, a job of a tenant, a client that left."""
    secret = key(queen, "ada", INFERENCE, Policy(tenant="acme", tier="free", models=("honey", "nothing")))
    limited = key(queen, "bob", INFERENCE, Policy(requests_per_minute=1))
    bearer = {"Authorization": f"Bearer {secret}"}
    assert call(queen, "POST", CHAT, HONEY, **bearer)[0] == 200
    assert call(queen, "POST", CHAT, {**HONEY, "model": "nothing"}, **bearer)[0] in (404, 503)
    assert call(queen, "POST", CHAT, {**HONEY, "model": "other"}, **bearer)[0] == 403
    assert [call(queen, "POST", CHAT, HONEY, Authorization=f"Bearer {limited}")[0] for _ in range(2)] == [200, 429]
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    with closing(connection):
        connection.request("POST", CHAT, json.dumps({**HONEY, "stream": True}), bearer)
        assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")


def page(queen: RunningQueen) -> str:
    return queen.client.send("GET", "/metrics").read().decode()


@contextmanager
def running_prometheus(folder: Path, target: str, secret: str) -> Iterator[Prometheus]:
    """Run Prometheus with the shipped files; only the address, the key's file and the times are others."""
    text = SCRAPE.read_text()
    (folder / "key").write_text(secret)
    changes = {"queen.example:7833": target, "/etc/prometheus/rbee.key": str(folder / "key"), ": 15s": ": 1s"}
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "prometheus.yml").write_text(text)
    shutil.copy(RULES, folder)
    port = free_port()
    command = [program("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        prometheus = Prometheus(port)
        until(lambda: process.poll() is not None or ready(prometheus), "Prometheus to answer")
        assert process.poll() is None, (folder / "log").read_text()
        yield prometheus
    finally:
        end(process)  # type: ignore[arg-type]  # it is only asked to end


def ready(prometheus: Prometheus) -> bool:
    with closing(http.client.HTTPConnection("127.0.0.1", prometheus.port, timeout=60)) as connection:
        try:
            connection.request("GET", "/-/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False


@pytest.fixture(scope="module")
def prometheus(queen: RunningQueen, worked: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    program("prometheus")
    secret = key(queen, "prometheus", METRICS)
    with running_prometheus(folder, urlsplit(queen.url).netloc, secret) as running:
        until(lambda: running.result("rate(rbee_jobs_total[30s])"), "two scrapes")
        yield running


def test_the_page_passes_promtools_check(queen: RunningQueen, worked: None) -> None:
    checked = subprocess.run(
        [program("promtool"), "check", "metrics"], input=page(queen), text=True, capture_output=True, timeout=60
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_every_metric_of_rules_and_dashboard_exists(queen: RunningQueen, worked: None) -> None:
    # Without a shared state there is no such series.
    existing = {*OF_PROMETHEUS, "rbee_shared_state_up"}
    shared = SimpleNamespace(link=SimpleNamespace(up=True))
    assert [family.name for family in SharedGauges(shared).collect()] == ["rbee_shared_state_up"]  # type: ignore[arg-type]
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", page(queen), re.MULTILINE):
        existing |= {f"{name}_{part}" for part in ("bucket", "count", "sum")} if kind == "histogram" else {name}
    named = {name: rule["alert"] for rule in alerts() for name in METRIC.findall(rule["expr"])}
    named |= {name: title for title, found in queries().items() for query in found for name in METRIC.findall(query)}
    assert len(named) > 30
    assert {name: where for name, where in named.items() if name not in existing} == {}


def test_every_metric_is_explained(queen: RunningQueen, worked: None) -> None:
    told = (ROOT / "docs" / "monitoring.md").read_text()
    names = re.findall(r"^# TYPE (rbee_\S+) \S+$", page(queen), re.MULTILINE)
    assert [name for name in names if f"`{name}`" not in told] == []
    assert [rule["alert"] for rule in alerts() if f"`{rule['alert']}`" not in told] == []


def test_the_shipped_files_pass_promtools_checks(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k")
    text = SCRAPE.read_text().replace("/etc/prometheus/rbee.key", str(tmp_path / "key"))
    (tmp_path / "prometheus.yml").write_text(text)
    shutil.copy(RULES, tmp_path)
    command = [program("promtool"), "check", "config", str(tmp_path / "prometheus.yml")]
    checked = subprocess.run(command, text=True, capture_output=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
    assert "rules found" in checked.stdout


def test_the_commands_that_alerts_advise_exist() -> None:
    commands = set(re.findall(r"^#+ (rbee [a-z -]+)$", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE))
    told = " ".join(rule["annotations"]["description"] for rule in alerts())
    advised = set(re.findall(r"\brbee [a-z]+(?: (?:status|list|logs|show|check))?\b", told))
    assert len(advised) >= 5
    assert advised <= commands


@dataclass(frozen=True)
class Case:
    """Series by which one alert fires, and others by which it does not. Values are one a minute."""

    alert: str
    bad: Mapping[str, str]
    good: Mapping[str, str]
    waits: bool = True
    """It is pending before it fires; one of rates may not be when it is looked at."""


def jobs(outcome: str) -> str:
    return f'rbee_jobs_total{{instance="q",model="m",endpoint="e",outcome="{outcome}"}}'


def bucket(name: str, le: str) -> str:
    return f'{name}_bucket{{instance="q",model="m",endpoint="e",priority="normal",le="{le}"}}'


CASES = [
    Case("RbeeQueenDown", {'up{job="rbee"}': "0x60"}, {'up{job="rbee"}': "1x60", 'up{job="other"}': "0x60"}),
    Case("RbeeHiveDown", {'rbee_hive_up{hive="h"}': "0x60"}, {'rbee_hive_up{hive="h"}': "1x60"}),
    Case(
        "RbeeWorkerDown",
        {f"rbee_worker_up{{{WORKER}}}": "0x60", f'rbee_worker_state{{{WORKER},state="failed"}}': "1x60"},
        {f"rbee_worker_up{{{WORKER}}}": "0x60", f'rbee_worker_state{{{WORKER},state="starting"}}': "1x60"},
    ),
    Case(
        "RbeeModelDown",
        {f"rbee_worker_up{{{WORKER}}}": "0x60"},
        {f"rbee_worker_up{{{WORKER}}}": "0x60", f"rbee_worker_up{{{WORKER.replace('says', 'too')}}}": "1x60"},
    ),
    Case("RbeeWorkerEjected", {"rbee_worker_ejected": "1x60"}, {"rbee_worker_ejected": "0x60"}),
    Case(
        "RbeeJobsFail",
        {jobs("ok"): "0+90x60", jobs("worker_lost"): "0+10x60"},
        {jobs("ok"): "0+90x60", jobs("cancelled"): "0+10x60", jobs("worker_lost"): "0+1x60"},
        waits=False,
    ),
    Case(
        "RbeeLoadsFail",
        {'rbee_model_load_seconds_count{model="m",outcome="load_failed"}': "0+1x60"},
        {'rbee_model_load_seconds_count{model="m",outcome="ok"}': "0+1x60"},
        waits=False,
    ),
    Case(
        "RbeeStreamsBreak",
        {'rbee_streams_broken_total{code="worker_lost"}': "0+1x60"},
        {'rbee_streams_broken_total{code="shutting_down"}': "0+9x60"},
        waits=False,
    ),
    Case(
        "RbeeRetries",
        {"rbee_job_retries_total": "0+15x60", jobs("ok").replace('instance="q",', ""): "0+100x60"},
        {"rbee_job_retries_total": "0+5x60", jobs("ok").replace('instance="q",', ""): "0+100x60"},
        waits=False,
    ),
    Case(
        "RbeeQueueSlow",
        {bucket("rbee_queue_wait_seconds", "30.0"): "0+1x60", bucket("rbee_queue_wait_seconds", "+Inf"): "0+10x60"}
        | {bucket("rbee_queue_wait_seconds", "60.0"): "0+10x60"},
        {bucket("rbee_queue_wait_seconds", "30.0"): "0+10x60", bucket("rbee_queue_wait_seconds", "+Inf"): "0+10x60"},
        waits=False,
    ),
    Case(
        "RbeeQueueFull",
        {'rbee_error_responses_total{status="503",code="queue_full"}': "0+60x60"},
        {'rbee_error_responses_total{status="429",code="rate_limit_exceeded"}': "0+60x60"},
        waits=False,
    ),
    Case(
        "RbeeSlowToAnswer",
        {
            bucket("rbee_time_to_first_byte_seconds", "10.0"): "0+1x60",
            bucket("rbee_time_to_first_byte_seconds", "60.0"): "0+10x60",
            bucket("rbee_time_to_first_byte_seconds", "+Inf"): "0+10x60",
        },
        {
            bucket("rbee_time_to_first_byte_seconds", "10.0"): "0+10x60",
            bucket("rbee_time_to_first_byte_seconds", "+Inf"): "0+10x60",
        },
        waits=False,
    ),
    Case("RbeeRecordsUnavailable", {"rbee_records_available": "0x60"}, {"rbee_records_available": "1x60"}),
    Case(
        "RbeeEventLoopLags",
        {"rbee_event_loop_longest_lag_seconds": "1.5x60"},
        {"rbee_event_loop_longest_lag_seconds": "0.2x60"},
    ),
    Case("RbeeSharedStateLost", {"rbee_shared_state_up": "0x60"}, {"rbee_shared_state_up": "1x60"}),
    Case("RbeeScriptInvalid", {"rbee_script_valid": "0x60"}, {"rbee_script_valid": "1x60"}),
    Case("RbeeInventoryInvalid", {"rbee_inventory_valid": "0x60"}, {"rbee_inventory_valid": "1x60"}),
    Case("RbeeGitopsFailing", {"rbee_gitops_failing": "1x60"}, {"rbee_gitops_failing": "0x60"}),
    Case(
        "RbeeGitopsStale",
        {"rbee_gitops_last_check_timestamp_seconds": "-4000x60"},
        {"rbee_gitops_last_check_timestamp_seconds": "0+60x60"},
    ),
    Case(
        "RbeeFewDescriptors",
        {'process_open_fds{job="rbee"}': "95x60", 'process_max_fds{job="rbee"}': "100x60"},
        {'process_open_fds{job="rbee"}': "50x60", 'process_max_fds{job="rbee"}': "100x60"},
    ),
]


def test_every_alert_has_a_case() -> None:
    assert sorted(case.alert for case in CASES) == sorted(rule["alert"] for rule in alerts())


def expected(alert: str, state: str, at_s: int) -> dict[str, Any]:
    query = f'count(ALERTS{{alertname="{alert}",alertstate="{state}"}}) or vector(0)'
    return {"expr": query, "eval_time": f"{at_s}s", "exp_samples": [{"labels": "{}", "value": 1}]}


def silent(alert: str, at_s: int) -> dict[str, Any]:
    query = f'count(ALERTS{{alertname="{alert}"}}) or vector(0)'
    return {"expr": query, "eval_time": f"{at_s}s", "exp_samples": [{"labels": "{}", "value": 0}]}


def test_each_alert_fires_when_it_should_and_not_before(tmp_path: Path) -> None:
    """`promtool test rules` with the shipped file as it is, on a clock of its own."""
    waits_s = {rule["alert"]: 60 * int(rule.get("for", "0m").removesuffix("m")) for rule in alerts()}
    tests = []
    for case in CASES:
        late_s = 40 * 60
        fires = [expected(case.alert, "firing", late_s)]
        if case.waits:
            fires.append(expected(case.alert, "pending", waits_s[case.alert] - 15))
        keeps_still = [silent(case.alert, at_s) for at_s in (60, late_s)]
        for name, series, checks in (("fires", case.bad, fires), ("keeps still", case.good, keeps_still)):
            told = [{"series": one, "values": values} for one, values in series.items()]
            test = {"interval": "1m", "input_series": told, "promql_expr_test": checks}
            tests.append({**test, "name": f"{case.alert} {name}"})
    shutil.copy(RULES, tmp_path)
    file = tmp_path / "tests.yml"
    file.write_text(yaml.safe_dump({"rule_files": [RULES.name], "evaluation_interval": "15s", "tests": tests}))
    run = subprocess.run([program("promtool"), "test", "rules", str(file)], text=True, capture_output=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr


def test_prometheus_takes_the_rules_and_has_no_trouble_with_them(prometheus: Prometheus) -> None:
    def evaluated() -> list[dict[str, Any]]:
        groups = prometheus.get("rules")["groups"]
        return [rule for group in groups for rule in group["rules"] if rule["health"] != "unknown"]

    until(lambda: len(evaluated()) == len(alerts()), "every rule to be evaluated")
    assert {rule["name"]: rule.get("lastError") for rule in evaluated() if rule["health"] != "ok"} == {}
    [target] = prometheus.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


RARE = {
    "Cancelled jobs by phase",
    "Left out (ejected)",
    "Retries and broken streams",
    "Jobs that wait",
    "Loads of models, p90",
}
"""Panels in which some query may have nothing to show while all is well."""


def test_the_dashboards_queries_have_answers(prometheus: Prometheus) -> None:
    found = {title: [prometheus.result(query) for query in several] for title, several in queries().items()}
    assert len(found) > 25
    assert [title for title, results in found.items() if title not in RARE and not all(results)] == []


def test_a_worker_that_dies_becomes_an_alert(prometheus: Prometheus, server: RunningServer) -> None:
    assert "RbeeWorkerDown" not in prometheus.alerts()
    until(lambda: prometheus.alerts().get("RbeeHiveDown"), "the hive that never answered to be an alert")
    server.process.kill()
    until(lambda: {"RbeeWorkerDown", "RbeeModelDown"} <= prometheus.alerts().keys(), "the alerts of the dead worker")
    assert prometheus.alerts()["RbeeWorkerDown"] == "pending"
