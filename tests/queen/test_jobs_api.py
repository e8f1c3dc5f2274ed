"""Jobs that nobody waits for: made, followed, resumed, cancelled, listed, and seen by their owner only."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import pytest
from job_calls import CHAT, call, chat, ended, events, following, make_key, post_job, slow_worker, text_of

from rbee.queen.metrics import read_usage
from rbee.testing.programs import RunningQueen, running_queen, until


@pytest.fixture(scope="module")
def queen() -> Iterator[RunningQueen]:
    """Return a queen whose worker takes 50 ms a word."""
    with running_queen() as running:
        slow_worker(running, 50)
        yield running


def test_a_job_runs_and_its_answer_can_be_had(queen: RunningQueen) -> None:
    status, headers, made = call(
        queen, "POST", "/v1/jobs", {"endpoint": CHAT, "body": chat("a b c"), "metadata": {"for": "me"}}
    )
    assert status == 202
    assert headers["x-rbee-job"] == made["job_id"]
    assert headers["location"] == f"/v1/jobs/{made['job_id']}"
    view = ended(queen, made["job_id"])
    assert view["status"] == "completed"
    assert view["response"]["choices"][0]["message"]["content"] == "a b c"
    assert view["metadata"] == {"for": "me"}
    assert view["usage"]["prompt_tokens"] == view["response"]["usage"]["prompt_tokens"] > 0
    assert view["usage"]["completion_tokens"] == view["response"]["usage"]["completion_tokens"] > 0
    assert view["worker"].endswith("/echo")
    assert view["created_at"] <= view["started_at"] <= view["ended_at"]


def test_the_events_of_a_stream_come_in_their_order_and_again_from_the_record(queen: RunningQueen) -> None:
    job = post_job(queen, chat("a b c d", stream=True, stream_options={"include_usage": True}))
    live = events(queen, job)
    names = [event.name for event in live]
    assert names[:3] == ["queued", "routed", "started"]
    assert set(names[3:-1]) == {"delta"}
    assert names[-1] == "done"
    assert [event.id for event in live] == list(range(1, len(live) + 1))
    assert text_of(live) == "a b c d"
    assert live[-1].data["usage"]["completion_tokens"] > 0
    assert events(queen, job) == live
    assert events(queen, job, last_id=live[3].id) == live[4:]


def test_a_reader_that_was_cut_off_goes_on_where_it_was(queen: RunningQueen) -> None:
    job = post_job(queen, chat("word " * 20, stream=True))
    seen = []
    with following(queen, job) as found:
        for event in found:
            seen.append(event)
            if len(seen) == 6:
                break
    rest = events(queen, job, last_id=seen[-1].id)
    assert [event.id for event in seen + rest] == list(range(1, len(seen + rest) + 1))
    assert text_of(seen + rest).split() == ["word"] * 20


def test_a_running_job_is_cancelled(queen: RunningQueen) -> None:
    job = post_job(queen, chat("word " * 1000, stream=True))
    with following(queen, job) as found:
        assert next(event for event in found if event.name == "delta")
        status, _, view = call(queen, "DELETE", f"/v1/jobs/{job}")
        assert (status, view["status"]) == (200, "cancelled")
        *_, last = found
    assert (last.name, last.data["error"]["code"]) == ("error", "cancelled")
    assert ended(queen, job)["error"]["code"] == "cancelled"
    assert call(queen, "DELETE", f"/v1/jobs/{job}")[2]["status"] == "cancelled"


def test_a_queued_job_is_cancelled_and_never_run(queen: RunningQueen) -> None:
    long_ones = [post_job(queen, chat("word " * 1000)) for _ in range(3)]
    until(lambda: call(queen, "GET", f"/v1/jobs/{long_ones[0]}")[2]["status"] == "running", "a job to run")
    waits = post_job(queen, chat("x"), priority="batch")
    assert call(queen, "DELETE", f"/v1/jobs/{waits}")[2]["status"] == "cancelled"
    for job in long_ones:
        assert call(queen, "DELETE", f"/v1/jobs/{job}")[2]["status"] == "cancelled"
    assert events(queen, waits)[-1].data["error"]["code"] == "cancelled"
    view = call(queen, "GET", f"/v1/jobs/{waits}")[2]
    assert view["status"] == "cancelled"
    assert view["usage"]["completion_tokens"] == 0


def test_a_request_is_a_job_too_and_can_be_cancelled_by_its_id(queen: RunningQueen) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(call, queen, "POST", CHAT, chat("word " * 1000))
        until(lambda: call(queen, "GET", "/v1/jobs?status=running")[2]["data"], "the request to run")
        [job] = call(queen, "GET", "/v1/jobs?status=running")[2]["data"]
        assert job["kind"] == "request"
        assert call(queen, "GET", f"/v1/jobs/{job['id']}")[2]["status"] == "running"
        assert call(queen, "DELETE", f"/v1/jobs/{job['id']}")[2]["status"] == "cancelled"
        assert waiting.result()[0] == 499
    assert ended(queen, job["id"])["status"] == "cancelled"


def test_every_request_is_recorded_with_its_usage(queen: RunningQueen) -> None:
    status, headers, answer = call(queen, "POST", CHAT, chat("x y"))
    assert status == 200
    view = call(queen, "GET", f"/v1/jobs/{headers['x-rbee-job']}")[2]
    assert (view["status"], view["kind"], view["model"], view["endpoint"]) == ("completed", "request", "echo", CHAT)
    assert view["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert "response" not in view


@pytest.mark.parametrize(
    ("data", "tokens"),
    [
        (b'{"usage":{"prompt_tokens": 7,"completion_tokens":9,"total_tokens":16}}', (7, 9)),
        (b'{"usage":{"input_tokens":7,"output_tokens":9}}', (7, 9)),
        (b'{"usage":{"input_tokens":7,"output_tokens":1}}\n{"usage":{"output_tokens":9}}', (7, 9)),
        (b'{"choices":[],"timings":{"cache_n":5,"prompt_n":2,"prompt_ms":1.5,"predicted_n":9}}', (7, 9)),
        (b'{"choices":[]}', (0, 0)),
    ],
)
def test_usage_is_read_in_the_words_of_every_engine(data: bytes, tokens: tuple[int, int]) -> None:
    assert read_usage(data) == tokens


def test_a_stream_names_its_job_in_a_comment(queen: RunningQueen) -> None:
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    with closing(connection):
        connection.request("POST", CHAT, json.dumps(chat("a", stream=True)).encode())
        answer = connection.getresponse()
        assert answer.readline().decode() == f": job {answer.getheader('X-Rbee-Job')}\n"
        assert answer.read().endswith(b"data: [DONE]\n\n")


def test_lists_are_paged_and_filtered(queen: RunningQueen) -> None:
    made = [post_job(queen, chat("x")) for _ in range(5)]
    for job in made:
        ended(queen, job)
    seen: list[str] = []
    page = call(queen, "GET", "/v1/jobs?limit=2&model=echo")[2]
    while page["data"]:
        seen += [job["id"] for job in page["data"]]
        page = call(queen, "GET", f"/v1/jobs?limit=2&model=echo&after={page['last_id']}")[2]
    assert seen[:5] == made[::-1]
    assert len(seen) == len(set(seen))
    assert call(queen, "GET", "/v1/jobs?model=nobody")[2]["data"] == []
    assert {job["status"] for job in call(queen, "GET", "/v1/jobs?status=completed")[2]["data"]} == {"completed"}
    for query in ("limit=0", "limit=101", "limit=x", "status=lost"):
        assert call(queen, "GET", f"/v1/jobs?{query}")[0] == 400


def test_a_job_that_fails_says_why(queen: RunningQueen) -> None:
    job = post_job(queen, {"model": "nobody-has-this", "messages": [{"role": "user", "content": "x"}]})
    assert ended(queen, job)["error"]["code"] == "model_not_found"
    last = events(queen, job)[-1]
    assert (last.name, last.data["error"]["code"]) == ("error", "model_not_found")


@pytest.mark.parametrize(
    "wanted",
    [
        {"endpoint": "/v1/models", "body": {}},
        {"endpoint": CHAT},
        {"endpoint": CHAT, "body": {"model": "echo"}},
        {"endpoint": CHAT, "body": chat(), "priority": "now"},
        {"endpoint": CHAT, "body": chat(), "metadata": {"a": 1}},
        {"endpoint": CHAT, "body": chat(), "surprise": True},
    ],
)
def test_a_job_that_cannot_run_is_refused_at_once(queen: RunningQueen, wanted: dict[str, object]) -> None:
    status, _, answer = call(queen, "POST", "/v1/jobs", wanted)
    assert status == 400
    assert answer["error"]["message"]


def test_a_key_sees_the_jobs_of_its_tenant_and_no_others(queen: RunningQueen) -> None:
    mine, colleague, other = (make_key(queen, name, tenant) for name, tenant in [("a", "x"), ("b", "x"), ("c", "")])
    job = post_job(queen, chat("secret"), key=mine)
    ended_by = {"Authorization": f"Bearer {colleague}"}
    until(lambda: call(queen, "GET", f"/v1/jobs/{job}", **ended_by)[2]["status"] == "completed", "the job to end")
    stranger = {"Authorization": f"Bearer {other}"}
    for method, path in [("GET", ""), ("GET", "/stream"), ("DELETE", "")]:
        assert call(queen, method, f"/v1/jobs/{job}{path}", **stranger)[0] == 404
        assert call(queen, method, f"/v1/jobs/{job}{path}")[0] == 404
    assert call(queen, "GET", "/v1/jobs", **stranger)[2]["data"] == []
    assert [one["id"] for one in call(queen, "GET", "/v1/jobs", **ended_by)[2]["data"]] == [job]
    operator = {"Authorization": f"Bearer {queen.record.token}"}
    assert call(queen, "GET", f"/v1/jobs/{job}", **operator)[2]["id"] == job


def test_a_task_is_one_prompt(queen: RunningQueen) -> None:
    task = {"prompt": "a b", "model": "echo", "capability": "text-gen", "stream": False}
    status, headers, answer = call(queen, "POST", "/v2/tasks", task)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "a b")
    assert call(queen, "GET", f"/v1/jobs/{headers['x-rbee-job']}")[2]["status"] == "completed"
    status, _, answer = call(queen, "POST", "/v2/tasks", {**task, "capability": "telepathy"})
    assert (status, answer["error"]["param"]) == (400, "capability")


@pytest.mark.parametrize("path", [CHAT, "/v1/jobs"])
def test_a_hundred_requests_with_one_idempotency_key_are_one(queen: RunningQueen, path: str) -> None:
    wanted = chat(f"once for {path}") if path == CHAT else {"endpoint": CHAT, "body": chat(f"once for {path}")}
    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        key = f"the only one for {path}"
        asked = [pool.submit(call, queen, "POST", path, wanted, Idempotency_Key=key) for _ in range(100)]
        answers = [one.result() for one in asked]
    assert {status for status, _, _ in answers} == {200 if path == CHAT else 202}
    assert len({headers["x-rbee-job"] for _, headers, _ in answers}) == 1
    assert all(answer == answers[0][2] for _, _, answer in answers)
    assert call(queen, "POST", path, wanted, Idempotency_Key=key)[2] == answers[0][2]
    other = chat("something else") if path == CHAT else {"endpoint": CHAT, "body": chat("something else")}
    status, _, answer = call(queen, "POST", path, other, Idempotency_Key=key)
    assert (status, answer["error"]["code"]) == (409, "idempotency_key_reused")


def test_an_idempotent_request_that_fails_can_be_sent_again(queen: RunningQueen) -> None:
    wanted = chat("x") | {"model": "nobody-has-this"}
    assert [call(queen, "POST", CHAT, wanted, Idempotency_Key="f")[0] for _ in range(2)] == [404, 404]
    assert call(queen, "POST", CHAT, chat("x"), Idempotency_Key="f")[0] == 200
    assert call(queen, "POST", CHAT, chat("x"), Idempotency_Key="\t")[0] == 400


def test_a_stream_is_given_again_whole(queen: RunningQueen) -> None:
    def ask() -> tuple[str | None, bytes]:
        connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
        with closing(connection):
            body = json.dumps(chat("a b c", stream=True)).encode()
            connection.request("POST", CHAT, body, {"Idempotency-Key": "stream"})
            answer = connection.getresponse()
            assert answer.getheader("Content-Type", "").startswith("text/event-stream")
            return answer.getheader("X-Rbee-Job"), answer.read()

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = [one.result() for one in [pool.submit(ask) for _ in range(10)]]
    answers.append(ask())
    assert len({job for job, _ in answers}) == 1
    texts = {b"".join(line for line in body.splitlines(True) if line.startswith(b"data:")) for _, body in answers}
    assert len(texts) == 1
    assert texts.pop().endswith(b"data: [DONE]\n")


def test_a_leader_that_leaves_gives_its_place_away(queen: RunningQueen) -> None:
    text = " ".join(["word"] * 40)
    first = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    first.request("POST", CHAT, json.dumps(chat(text)).encode(), {"Idempotency-Key": "left"})
    until(lambda: call(queen, "GET", "/v1/jobs?status=running")[2]["data"], "the first request to run")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        second = pool.submit(call, queen, "POST", CHAT, chat(text), Idempotency_Key="left")
        first.close()
        status, _, answer = second.result()
    assert (status, answer["choices"][0]["message"]["content"]) == (200, text)
