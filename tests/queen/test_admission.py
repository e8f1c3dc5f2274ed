"""The queue of a model: its order, its bounds, and what those who wait are told; by the rules and in a real queen."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from gevent.event import Event

from rbee.errors import LoadFailed, QueueFull
from rbee.queen.access import LOCAL
from rbee.queen.client_watch import ClientWatch
from rbee.queen.job import Job, Reply
from rbee.queen.keys import KeyStore
from rbee.queen.policy import Policy, Priority
from rbee.queen.queueing import ModelQueue, Queues, Ticket
from rbee.queen.waiting import Patience, WaitingStream
from rbee.testing.programs import RunningQueen, running_queen, until
from rbee.wire.fleet import SpawnWorker, WorkerReport, WorkerState
from rbee.wire.openai import decode

CHAT = "/v1/chat/completions"


class Line:
    """A queue of one slot on a clock of the test's own, and the order in which it lets jobs go."""

    def __init__(self, limit: int = 100) -> None:
        self.now_s = 0.0
        self.queue = ModelQueue(limit, 30.0, lambda: self.now_s)
        assert self.queue.enter("interactive", "first", 1, 1) is None
        self.waiting: dict[str, tuple[Priority, Ticket]] = {}

    def join(self, name: str, key: str = "k", tokens: int = 100, priority: Priority = "interactive") -> None:
        ticket = self.queue.enter(priority, key, tokens, 1)
        assert ticket is not None
        self.waiting[name] = priority, ticket

    def leave(self, name: str) -> None:
        self.queue.leave(*self.waiting.pop(name))

    def next(self) -> str:
        self.queue.done(1.0)
        self.queue.grant(1)
        [granted] = [name for name, (_, ticket) in self.waiting.items() if ticket.granted.is_set()]
        del self.waiting[granted]
        return granted

    def order(self) -> str:
        return " ".join(self.next() for _ in range(len(self.waiting)))


def test_one_key_is_served_in_order() -> None:
    line = Line()
    for name in "abc":
        line.join(name)
    assert line.order() == "a b c"


def test_the_more_urgent_goes_first() -> None:
    line = Line()
    line.join("batch", priority="batch")
    line.join("normal", priority="normal")
    line.join("interactive")
    assert line.order() == "interactive normal batch"


def test_a_key_that_sends_much_waits_for_its_own_jobs() -> None:
    line = Line()
    for number in range(1, 5):
        line.join(f"a{number}", key="a")
    line.join("b1", key="b")
    line.join("c1", key="c")
    line.join("b2", key="b")
    assert line.order() == "a1 b1 c1 a2 b2 a3 a4"


def test_shares_are_of_tokens_not_of_jobs() -> None:
    line = Line()
    for number in range(1, 4):
        line.join(f"big{number}", key="a", tokens=1000)
    for number in range(1, 13):
        line.join(f"s{number}", key="b", tokens=250)
    assert line.order() == "big1 s1 s2 s3 s4 big2 s5 s6 s7 s8 big3 s9 s10 s11 s12"


def test_a_key_that_was_away_has_saved_up_nothing() -> None:
    line = Line()
    for number in range(1, 7):
        line.join(f"a{number}", key="a")
    assert [line.next() for _ in range(3)] == ["a1", "a2", "a3"]
    for number in range(1, 4):
        line.join(f"b{number}", key="b")
    assert line.order() == "b1 a4 b2 a5 b3 a6"


def test_nobody_starves() -> None:
    line = Line(limit=200)
    line.join("batch", priority="batch")
    for number in range(100):
        line.join(f"i{number}")
    served = []
    while "batch" not in served:
        line.now_s += 1
        served.append(line.next())
    assert len(served) == 30


def test_who_leaves_is_never_served_and_frees_what_it_was_granted() -> None:
    line = Line()
    for name in "abc":
        line.join(name)
    line.leave("b")
    assert line.order() == "a c"
    line.join("d")
    line.queue.done(1.0)
    line.queue.grant(1)
    line.leave("d")
    assert line.queue.idle
    assert line.queue.enter("interactive", "k", 1, 1) is None


def test_a_full_queue_says_when_to_come_again() -> None:
    line = Line(limit=3)
    for name in "abc":
        line.join(name)
    with pytest.raises(QueueFull, match="3 jobs wait") as full:
        line.join("d")
    assert (full.value.status, full.value.code, full.value.retry_after_s) == (503, "queue_full", 3)
    line.leave("a")
    line.join("d")


def test_a_thousand_who_leave_leave_nothing_behind() -> None:
    slots = {"m": 1}
    queues = Queues(slots.__getitem__)
    queue = queues.of("m")
    assert queue.enter("batch", "k", 1, 1) is None
    for number in range(1000):
        ticket = queue.enter("batch", f"k{number}", 1, 1)
        assert ticket is not None
        queue.leave("batch", ticket)
    assert len(queue._lanes["batch"]._heap) < 50
    queue.done(1.0)
    queues.grant("m")
    assert queues.counts() == {}


def test_new_slots_let_those_who_wait_go() -> None:
    slots = {"m": 1}
    queues = Queues(slots.__getitem__)
    queue = queues.of("m")
    queue.enter("normal", "k", 1, 1)
    tickets = [queue.enter("normal", "k", 1, 1) for _ in range(3)]
    assert queues.grant_all()
    assert not any(ticket.granted.is_set() for ticket in tickets if ticket)
    slots["m"] = 3
    assert queues.grant_all()
    assert [ticket.granted.is_set() for ticket in tickets if ticket] == [True, True, False]


@pytest.fixture
def own_queen() -> Iterator[RunningQueen]:
    """Return a queen that the test may break."""
    with running_queen() as running:
        yield running


def connect(queen: RunningQueen) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)


def chat(text: str = "one two three", **fields: Any) -> bytes:
    return json.dumps({"model": "echo", "messages": [{"role": "user", "content": text}], **fields}).encode()


def ask(queen: RunningQueen, body: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = connect(queen)
    try:
        connection.request("POST", CHAT, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def metrics(queen: RunningQueen, bearer: str = "") -> str:
    connection = connect(queen)
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {bearer}"} if bearer else {})
    page = connection.getresponse().read().decode()
    connection.close()
    return page


def metric(queen: RunningQueen, start: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in metrics(queen).splitlines() if line.startswith(start))


def spawn(queen: RunningQueen, **options: str) -> WorkerReport:
    """Start an echo worker of one slot and wait until it is ready."""
    hive = queen.status().hives[0].hive
    wanted = SpawnWorker(model="echo", backend="echo", slots=1, options=options)
    name = queen.client.post(f"/v1/hives/{hive}/workers", wanted, WorkerReport).name

    def report() -> WorkerReport:
        workers = {worker.name: worker for hive in queen.status().hives for worker in hive.workers}
        return workers.get(name) or WorkerReport(name=name, model="", backend="", state=WorkerState.STARTING)

    until(lambda: report().state is not WorkerState.STARTING, f"{name} to start")
    assert report().state is WorkerState.READY, report().reason
    return report()


def key(queen: RunningQueen, name: str, policy: Policy) -> str:
    return KeyStore(queen.home / "state" / "keys.sqlite").create(name, policy=policy)[1]


def hold(queen: RunningQueen) -> socket.socket:
    """Occupy the only slot with a long stream, and return its connection."""
    parts = urlsplit(queen.url)
    sock = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60)
    body = chat("word " * 1000, stream=True)
    sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert sock.recv(10)
    return sock


def waiting(queen: RunningQueen, number: int) -> None:
    until(lambda: metric(queen, "rbee_queue_jobs") == number, f"{number} jobs to wait")


def test_the_urgent_overtakes_and_who_leaves_is_never_run(own_queen: RunningQueen) -> None:
    worker = spawn(own_queen, delay_ms="200")
    holder = hold(own_queen)
    order: list[str] = []

    def send(name: str, **fields: Any) -> threading.Thread:
        def run() -> None:
            assert ask(own_queen, chat("x", **fields))[0] == 200
            order.append(name)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [send("batch", priority="batch")]
    waiting(own_queen, 1)
    threads.append(send("normal", priority="normal"))
    waiting(own_queen, 2)
    gone = connect(own_queen)
    gone.request("POST", CHAT, chat("never"))
    waiting(own_queen, 3)
    threads.append(send("interactive"))
    waiting(own_queen, 4)
    gone.close()
    waiting(own_queen, 3)
    assert metric(own_queen, "rbee_worker_jobs") == 1
    holder.close()
    for thread in threads:
        thread.join()
    assert order == ["interactive", "normal", "batch"]
    assert worker.slots == 1
    assert metric(own_queen, 'rbee_jobs_cancelled_total{phase="queued"}') == 1
    assert metric(own_queen, 'rbee_jobs_total{endpoint="/v1/chat/completions",model="echo",outcome="cancelled"}') == 2
    assert metric(own_queen, "rbee_jobs_in_flight") == 0


def test_a_stream_that_waits_is_kept_alive_and_openai_reads_it(own_queen: RunningQueen) -> None:
    spawn(own_queen, delay_ms="100")
    holder = hold(own_queen)
    connection = connect(own_queen)
    connection.request("POST", CHAT, chat("a b", stream=True))
    with openai.OpenAI(base_url=own_queen.url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": "one two"}], stream=True
        )
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.getheader("Content-Type", "").startswith("text/event-stream")
        comment = answer.readline()
        assert comment.startswith(b": queued {")
        assert json.loads(comment.removeprefix(b": queued "))["model"] == "echo"
        waiting(own_queen, 2)
        holder.close()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == "one two"
    assert answer.read().decode().rstrip().endswith("data: [DONE]")
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_what_no_worker_can_do_is_refused_at_once_and_not_after_its_turn(own_queen: RunningQueen, stream: bool) -> None:
    spawn(own_queen, delay_ms="200")
    holder = hold(own_queen)
    connection = connect(own_queen)
    connection.request("POST", "/v1/messages", chat(max_tokens=5, stream=stream))
    answer = connection.getresponse()
    assert answer.status == 400
    assert json.loads(answer.read())["error"]["code"] == "not_supported"
    connection.close()
    waiting(own_queen, 0)
    assert metric(own_queen, "rbee_worker_jobs") == 1
    holder.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_job_that_waits(own_queen: RunningQueen, stream: bool) -> None:
    spawn(own_queen, delay_ms="200")
    holder = hold(own_queen)
    status, _, body = ask(own_queen, chat("x", stream=stream), X_Request_Timeout="0.3")
    assert (status, json.loads(body)["error"]["code"]) == (504, "deadline_exceeded")
    waiting(own_queen, 0)
    holder.close()


def test_a_deadline_ends_a_job_at_the_worker_and_in_the_middle_of_a_stream(own_queen: RunningQueen) -> None:
    spawn(own_queen, delay_ms="200")
    status, _, body = ask(own_queen, chat("word " * 100), X_Request_Timeout="0.5")
    assert (status, json.loads(body)["error"]["code"]) == (504, "deadline_exceeded")
    status, _, body = ask(own_queen, chat("word " * 100, stream=True), X_Request_Timeout="1")
    last = [line for line in body.decode().splitlines() if line.startswith("data: ")][-1]
    assert (status, json.loads(last[6:])["error"]["code"]) == (200, "deadline_exceeded")
    assert body.count(b"data: ") > 1
    until(lambda: metric(own_queen, "rbee_worker_jobs") == 0, "the worker to be free")
    assert ask(own_queen, chat("x"), X_Request_Timeout="60")[0] == 200


@pytest.mark.parametrize("told", ["0", "-1", "nan", "inf", "soon", "1e9", ""])
def test_a_deadline_that_is_none_is_refused(queen: RunningQueen, told: str) -> None:
    status, _, body = ask(queen, chat(), X_Request_Timeout=told)
    assert (status, json.loads(body)["error"]["param"]) == (400, "X-Request-Timeout")


def test_a_priority_that_is_none_is_refused_and_the_engines_own_is_let_through(queen: RunningQueen) -> None:
    assert ask(queen, chat(priority="urgent"))[0] == 400
    assert ask(queen, chat(), X_Rbee_Priority="urgent")[0] == 400
    assert ask(queen, chat(priority=3), X_Rbee_Priority="batch")[0] == 200


def test_a_key_is_held_to_its_models_and_rates_as_openai_says_it(own_queen: RunningQueen) -> None:
    secret = key(own_queen, "k", Policy(models=("echo",), requests_per_minute=2, tokens_per_minute=10_000))
    bearer = {"Authorization": f"Bearer {secret}"}
    status, headers, _ = ask(own_queen, chat(), **bearer)
    assert status == 200
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-remaining-requests"] == "1"
    assert headers["x-ratelimit-limit-tokens"] == "10000"
    assert ask(own_queen, chat().replace(b"echo", b"rbee-demo"), **bearer)[0] == 403
    assert ask(own_queen, chat(), **bearer)[0] == 200
    with openai.OpenAI(base_url=own_queen.url + "/v1", api_key=secret, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["echo"]
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "x"}])
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30


def test_a_budget_holds_after_the_queen_was_started_again(own_queen: RunningQueen) -> None:
    secret = key(own_queen, "k", Policy(tenant="acme", requests_per_day=1))
    bearer = {"Authorization": f"Bearer {secret}"}
    assert ask(own_queen, chat(), **bearer)[0] == 200
    own_queen.process.send_signal(signal.SIGTERM)
    own_queen.process.wait(60)
    with running_queen(home=own_queen.home) as again:
        status, headers, body = ask(again, chat(), **bearer)
        assert (status, json.loads(body)["error"]["code"]) == (429, "insufficient_quota")
        assert 0 < int(headers["retry-after"]) <= 86_400


def test_a_tenant_sees_its_own_series_and_no_other(own_queen: RunningQueen) -> None:
    acme, other = (key(own_queen, name, Policy(tenant=name)) for name in ("acme", "other"))
    for secret in (acme, acme, other):
        assert ask(own_queen, chat(), Authorization=f"Bearer {secret}")[0] == 200
    page = metrics(own_queen, acme)
    assert 'rbee_tenant_jobs_total{model="echo",outcome="ok",tenant="acme"} 2.0' in page
    assert 'direction="out"' in page
    lines = [line for line in page.splitlines() if not line.startswith("#")]
    assert lines
    assert all('tenant="acme"' in line for line in lines)
    whole = metrics(own_queen)
    assert 'rbee_tenant_jobs_total{model="echo",outcome="ok",tenant="other"} 1.0' in whole
    assert "rbee_jobs_total" in whole


def test_a_locked_file_of_keys_is_503_and_holds_nobody_up(own_queen: RunningQueen) -> None:
    secret = key(own_queen, "k", Policy())
    assert ask(own_queen, chat(), Authorization=f"Bearer {secret}")[0] == 200
    KeyStore(own_queen.home / "state" / "keys.sqlite").create("newer")
    writer = sqlite3.connect(own_queen.home / "state" / "keys.sqlite")
    writer.execute("BEGIN EXCLUSIVE")
    answers: list[tuple[int, dict[str, str], bytes]] = []
    asking = threading.Thread(target=lambda: answers.append(ask(own_queen, chat(), Authorization=f"Bearer {secret}")))
    asking.start()
    for _ in range(5):
        assert ask(own_queen, chat())[0] == 200
    assert not answers
    asking.join()
    writer.close()
    assert answers[0][0] == 503
    assert json.loads(answers[0][2])["error"]["code"] == "busy"
    assert ask(own_queen, chat(), Authorization=f"Bearer {secret}")[0] == 200
    assert "Traceback" not in "\n".join(own_queen.log)


def test_a_load_outlives_the_client_that_asked_for_it(own_queen: RunningQueen) -> None:
    body = chat("x", max_tokens=1).replace(b"echo", b"rbee-demo")
    status, _, answer = ask(own_queen, body, X_Request_Timeout="0.01")
    assert (status, json.loads(answer)["error"]["code"]) == (504, "deadline_exceeded")

    def ready() -> bool:
        workers = [worker for hive in own_queen.status().hives for worker in hive.workers]
        return any(worker.model == "rbee-demo" and worker.state is WorkerState.READY for worker in workers)

    until(ready, "the model to be loaded for nobody")
    assert ask(own_queen, body)[0] == 200


def stream_of(reply: Reply) -> WaitingStream:
    assert isinstance(reply.body, WaitingStream)
    return reply.body


def test_what_happens_is_told_while_a_model_loads() -> None:
    request = decode(CHAT, chat(stream=True))
    job = Job(CHAT, request, b"", LOCAL, ClientWatch(None))
    loaded = Event()
    told: list[dict[str, object]] = [
        {"state": "loading", "progress": 0.63},
        {"state": "running"},
        {"state": "running"},
    ]

    def status(job: Job) -> dict[str, object]:
        if len(told) == 1:
            loaded.set()
        return told.pop(0)

    def run(job: Job) -> Reply:
        loaded.wait()
        return Reply(200, "text/event-stream", iter([b"data: 1\n\n", b"data: [DONE]\n\n"]))

    reply = Patience(status, after_s=0.01, drain_s=30, draining_since=lambda: None).reply(job, run)
    assert list(stream_of(reply)) == [
        b': loading {"state":"loading","progress":0.63}\n\n',
        b": ping\n\n",
        b": ping\n\n",
        b"data: 1\n\n",
        b"data: [DONE]\n\n",
    ]


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_what_fails_after_the_head_ends_the_stream_with_a_typed_event(path: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 5}
    job = Job(path, decode(path, json.dumps(body).encode()), b"", LOCAL, ClientWatch(None))
    fail = Event()

    def run(job: Job) -> Reply:
        fail.wait()
        raise LoadFailed("no room")

    reply = Patience(lambda job: {"state": "running"}, after_s=0.01, drain_s=30, draining_since=lambda: None).reply(
        job, run
    )
    chunks = stream_of(reply)
    assert next(chunks) == b": ping\n\n"
    fail.set()
    rest = b"".join(chunks)
    assert b"no room" in rest
    assert b"[DONE]" not in rest
    assert (b"event: error\n" in rest) is (path != CHAT)


def test_whoever_leaves_a_waiting_stream_ends_its_job() -> None:
    job = Job(CHAT, decode(CHAT, chat(stream=True)), b"", LOCAL, ClientWatch(None))
    ended = Event()

    def run(job: Job) -> Reply:
        job.client.gone.wait()
        ended.set()
        job.client.check()
        raise AssertionError

    reply = Patience(lambda job: {"state": "running"}, after_s=0.01, drain_s=30, draining_since=lambda: None).reply(
        job, run
    )
    body = stream_of(reply)
    next(body)
    body.close()
    assert ended.wait(10)


def test_a_drain_ends_what_still_waits() -> None:
    job = Job(CHAT, decode(CHAT, chat(stream=True)), b"", LOCAL, ClientWatch(None))

    def run(job: Job) -> Reply:
        job.client.gone.wait()
        job.client.check()
        raise AssertionError

    reply = Patience(lambda job: {"state": "queued"}, after_s=0.01, drain_s=1, draining_since=lambda: 0.0).reply(
        job, run
    )
    body = stream_of(reply)
    [last] = body
    body.close()
    assert json.loads(last[6:])["error"]["code"] == "shutting_down"
