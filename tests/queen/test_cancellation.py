"""A client that leaves ends its job in whatever phase it is: at the worker, in its queue, in the count of its phase."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from job_calls import call
from queen_rig import FleetFolder, until_state

from rbee.testing.openai_server import RunningServer, running_server
from rbee.testing.programs import RunningQueen, running_queen, until

CHAT = "/v1/chat/completions"
PHASES = {"queued", "routing", "loading", "prefill", "decode", "whole"}


def chat(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": "honey", "messages": [{"role": "user", "content": text}], **fields}


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


@pytest.fixture
def queen(fleet: FleetFolder, server: RunningServer) -> Iterator[RunningQueen]:
    """Return a queen with one worker of one slot."""
    fleet.write(desk=["HivePort none", f"Worker s model=honey slots=1 url={server.url}"])
    with running_queen("--no-hive", "--inventory", str(fleet.folder)) as running:
        until_state(running, "desk", "ready")
        yield running


def metric(queen: RunningQueen, start: str) -> float:
    lines = queen.client.send("GET", "/metrics").read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


def cancelled(queen: RunningQueen) -> dict[str, float]:
    """Return how many jobs were cancelled in each phase in which any was."""
    page = queen.client.send("GET", "/metrics").read().decode()
    found = dict(re.findall(r'^rbee_jobs_cancelled_total\{phase="(\w+)"\} (\S+)$', page, re.MULTILINE))
    assert set(found) <= PHASES
    return {phase: float(number) for phase, number in found.items() if float(number)}


def asked(queen: RunningQueen, body: dict[str, Any]) -> http.client.HTTPConnection:
    """Send a request, whose client leaves when the connection is closed."""
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    connection.request("POST", CHAT, json.dumps(body))
    return connection


def leave_after(connection: http.client.HTTPConnection, word: bytes) -> None:
    """Read a stream up to a word, and leave."""
    with connection.getresponse() as answer:
        until(lambda: word in answer.readline(), "the word to come")
    connection.close()


def until_under_way(server: RunningServer) -> None:
    until(lambda: server.told().in_flight == 1, "the job to reach the worker")


def until_free(queen: RunningQueen, server: RunningServer) -> None:
    """Wait until nothing runs at the worker, and nothing is taken of the queen's slots; the next job is answered."""
    until(lambda: server.told().in_flight == 0, "the worker to be free")
    until(lambda: metric(queen, "rbee_jobs_in_flight") == 0, "the job to end")
    assert metric(queen, "rbee_worker_jobs") == 0
    server.behave()
    assert call(queen, "POST", CHAT, chat())[0] == 200


def test_while_it_waits_for_its_turn(queen: RunningQueen, server: RunningServer) -> None:
    server.behave(answer="hang")
    holder = asked(queen, chat())
    until_under_way(server)
    for stream in (False, True):
        waits = asked(queen, chat("never", stream=stream))
        until(lambda: metric(queen, "rbee_queue_jobs") == 1, "the job to wait")
        waits.close()
        until(lambda: metric(queen, "rbee_queue_jobs") == 0, "the job to leave")
    assert server.told().jobs == 1
    until(lambda: cancelled(queen) == {"queued": 2}, "both to be counted")
    holder.close()
    until_free(queen, server)
    assert cancelled(queen) == {"queued": 2, "whole": 1}
    assert server.told().body == chat()


@pytest.mark.parametrize("stream", [False, True])
def test_while_its_model_is_loaded(fleet: FleetFolder, stream: bool) -> None:
    fleet.write()
    queen_of = running_queen("--no-hive", "--inventory", str(fleet.folder))
    with queen_of as queen, fleet.hive("one") as hive:
        [worker] = hive.client.get("/v1/hive", dict[str, Any])["workers"]
        hive.change(workers=[{**worker, "state": "starting", "progress": 0.4}])
        fleet.write(one=hive.port)
        until_state(queen, "one", "ready")
        waits = asked(queen, chat(stream=stream))
        until(lambda: metric(queen, "rbee_jobs_in_flight") == 1, "the job to wait")
        if stream:
            # Its comments tell what it waits for; of others, nothing shows it.
            assert waits.getresponse().readline().startswith(b": loading ")
        waits.close()
        until(lambda: cancelled(queen) == {"loading": 1}, "the job to be counted")
        assert metric(queen, "rbee_jobs_in_flight") == 0
        # The load outlives it.
        hive.change(workers=[{**worker, "state": "ready"}])
        assert call(queen, "POST", CHAT, chat())[0] == 200


def test_before_the_first_byte_of_a_stream(queen: RunningQueen, server: RunningServer) -> None:
    server.behave(first_s=600)
    connection = asked(queen, chat(stream=True))
    until_under_way(server)
    connection.close()
    until(lambda: server.told().cancelled == 1, "the worker to see the connection closed")
    until_free(queen, server)
    assert cancelled(queen) == {"prefill": 1}


def test_in_the_middle_of_a_stream(queen: RunningQueen, server: RunningServer) -> None:
    server.behave(word_s=0.05)
    connection = asked(queen, chat("word " * 5000, stream=True))
    leave_after(connection, b"word")
    until(lambda: server.told().cancelled == 1, "the worker to see the connection closed")
    until_free(queen, server)
    assert cancelled(queen) == {"decode": 1}


def test_in_a_silence_of_a_stream(queen: RunningQueen, server: RunningServer) -> None:
    """Nothing is written to the client then: its connection is watched."""
    server.behave(word_s=600)
    connection = asked(queen, chat("one two", stream=True))
    leave_after(connection, b"one")
    until(lambda: server.told().cancelled == 1, "the worker to see the connection closed")
    until_free(queen, server)
    assert cancelled(queen) == {"decode": 1}


def test_while_a_whole_answer_is_made(queen: RunningQueen, server: RunningServer) -> None:
    server.behave(answer="hang")
    connection = asked(queen, chat())
    until_under_way(server)
    connection.close()
    until(lambda: server.told().cancelled == 1, "the worker to see the connection closed")
    until_free(queen, server)
    assert cancelled(queen) == {"whole": 1}


@pytest.fixture(params=["whole", "prefill", "decode"])
def phase(request: pytest.FixtureRequest, server: RunningServer) -> str:
    """Return a phase in which a job will stay at the worker."""
    stays: dict[str, dict[str, Any]] = {
        "whole": {"answer": "hang"},
        "prefill": {"first_s": 600},
        "decode": {"word_s": 600},
    }
    phase: str = request.param
    server.behave(**stays[phase])
    return phase


def test_a_job_that_nobody_waits_for(queen: RunningQueen, server: RunningServer, phase: str) -> None:
    wanted = {"endpoint": CHAT, "body": chat(stream=phase != "whole")}
    job_id = call(queen, "POST", "/v1/jobs", wanted)[2]["job_id"]
    until_under_way(server)
    if phase == "decode":
        until(lambda: metric(queen, "rbee_time_to_first_byte_seconds_count") == 1, "its first byte")
    waits = call(queen, "POST", "/v1/jobs", {"endpoint": CHAT, "body": chat("never")})[2]["job_id"]
    until(lambda: metric(queen, "rbee_queue_jobs") == 1, "the second to wait for its turn")
    for one in (waits, job_id):
        assert call(queen, "DELETE", f"/v1/jobs/{one}")[2]["status"] == "cancelled"
    until(lambda: server.told().cancelled == 1, "the worker to see the connection closed")
    until_free(queen, server)
    assert cancelled(queen) == {"queued": 1, phase: 1}
    assert call(queen, "GET", f"/v1/jobs/{job_id}")[2]["status"] == "cancelled"
    # A second word changes nothing.
    assert call(queen, "DELETE", f"/v1/jobs/{job_id}")[2]["status"] == "cancelled"
    assert cancelled(queen) == {"queued": 1, phase: 1}


def test_a_request_is_cancelled_by_its_id(queen: RunningQueen, server: RunningServer, phase: str) -> None:
    with contextlib.closing(asked(queen, chat(stream=phase != "whole"))):
        until_under_way(server)
        if phase == "decode":
            until(lambda: metric(queen, "rbee_time_to_first_byte_seconds_count") == 1, "its first byte")
        [job] = call(queen, "GET", "/v1/jobs?status=running")[2]["data"]
        assert call(queen, "DELETE", f"/v1/jobs/{job['id']}")[2]["status"] == "cancelled"
        until(lambda: server.told().cancelled == 1, "the worker to see the connection closed")
    until_free(queen, server)
    assert cancelled(queen) == {phase: 1}


def test_the_lines_of_a_batch(queen: RunningQueen, server: RunningServer) -> None:
    """One runs, one waits for its turn there, and none of them is run after it was cancelled."""
    server.behave(answer="hang")
    lines = [{"custom_id": str(n), "method": "POST", "url": CHAT, "body": chat(str(n))} for n in range(40)]
    batch = post_batch(queen, "\n".join(map(json.dumps, lines)))
    until_under_way(server)
    until(lambda: metric(queen, "rbee_queue_jobs") == 15, "as many lines as may run at once to wait for their turn")
    assert call(queen, "POST", f"/v1/batches/{batch}/cancel")[0] == 200
    until(lambda: call(queen, "GET", f"/v1/batches/{batch}")[2]["status"] == "cancelled", "the batch to end")
    until(lambda: server.told().cancelled == 1, "the worker to see the connection closed")
    assert server.told().jobs == 1
    until_free(queen, server)
    assert cancelled(queen) == {"queued": 39, "whole": 1}


def post_batch(queen: RunningQueen, lines: str) -> str:
    """Upload the lines of a batch and create it; return its id."""
    boundary = "b"
    head = 'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch'
    file = f'Content-Disposition: form-data; name="file"; filename="b.jsonl"\r\n\r\n{lines}'
    form = f"--{boundary}\r\n{head}\r\n--{boundary}\r\n{file}\r\n--{boundary}--\r\n"
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/files", form, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
        answer = connection.getresponse()
        told = json.loads(answer.read())
        assert answer.status == 200, told
    wanted = {"input_file_id": told["id"], "endpoint": CHAT, "completion_window": "24h"}
    return str(call(queen, "POST", "/v1/batches", wanted)[2]["id"])
