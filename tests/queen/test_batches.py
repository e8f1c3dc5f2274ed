"""Files and batches, with OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from job_calls import CHAT, call, chat, make_key, rows, slow_worker

from rbee.testing.programs import RunningQueen, running_queen, until


@pytest.fixture
def client(queen: RunningQueen) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{queen.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def lines(*texts: str, **fields: Any) -> bytes:
    """Return an input file with one chat for each text."""
    return b"".join(
        json.dumps({"custom_id": f"id-{n}", "method": "POST", "url": CHAT, "body": chat(text), **fields}).encode()
        + b"\n"
        for n, text in enumerate(texts)
    )


def start(client: openai.OpenAI, data: bytes) -> str:
    file = client.files.create(file=("requests.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id


def over(client: openai.OpenAI, batch: str) -> Any:
    until(lambda: client.batches.retrieve(batch).status in ("completed", "failed", "cancelled"), f"{batch} to end")
    return client.batches.retrieve(batch)


def completed(client: openai.OpenAI, batch: str) -> int:
    counts = client.batches.retrieve(batch).request_counts
    return counts.completed if counts else 0


def read(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_a_batch_answers_every_line(client: openai.OpenAI) -> None:
    texts = [f"number {n}" for n in range(40)]
    file = client.files.create(file=("requests.jsonl", lines(*texts)), purpose="batch")
    assert client.files.retrieve(file.id).bytes == len(lines(*texts))
    assert client.files.content(file.id).content == lines(*texts)
    batch = client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"night": "1"}
    )
    done = over(client, batch.id)
    assert (done.status, done.metadata, done.errors) == ("completed", {"night": "1"}, None)
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (40, 40, 0)
    assert done.error_file_id is None
    answers = read(client, done.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"id-{n}" for n in range(40)]
    assert [a["response"]["body"]["choices"][0]["message"]["content"] for a in answers] == texts
    assert {(a["response"]["status_code"], a["error"]) for a in answers} == {(200, None)}
    assert client.batches.list(limit=1).data[0].id == batch.id
    assert done.output_file_id in [one.id for one in client.files.list()]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_the_lines_that_fail_are_in_the_error_file(client: openai.OpenAI) -> None:
    bad = json.dumps({"custom_id": "bad", "method": "POST", "url": CHAT, "body": chat("x") | {"model": "nobody"}})
    done = over(client, start(client, lines("good") + bad.encode()))
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 1, 1)
    assert [answer["custom_id"] for answer in read(client, done.output_file_id)] == ["id-0"]
    [error] = read(client, done.error_file_id)
    assert (error["custom_id"], error["response"], error["error"]["code"]) == ("bad", None, "model_not_found")


@pytest.mark.parametrize(
    ("data", "line", "code"),
    [
        (b"", None, "empty_file"),
        (b"\n\n", None, "empty_file"),
        (lines("a") + b"not json\n", 2, "invalid_value"),
        (lines("a") + lines("b"), 2, "duplicate_custom_id"),
        (lines("a", url="/v1/embeddings"), 1, "mismatched_url"),
        (lines("a", body={"model": "echo"}), 1, "invalid_value"),
        (lines("a", body=chat("x", stream=True)), 1, "invalid_value"),
    ],
)
def test_a_bad_file_fails_with_the_line(client: openai.OpenAI, data: bytes, line: int | None, code: str) -> None:
    done = over(client, start(client, data))
    assert done.status == "failed"
    assert done.errors is not None
    [problem] = done.errors.data
    assert (problem.line, problem.code) == (line, code)


def test_forms_that_are_none_are_refused(client: openai.OpenAI, queen: RunningQueen) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("x.jsonl", b"{}"), purpose="assistants")
    assert call(queen, "POST", "/v1/files", {"purpose": "batch"})[0] == 400
    cut = call(queen, "POST", "/v1/files", None, Content_Type="multipart/form-data; boundary=x")
    assert (cut[0], cut[2]["error"]["type"]) == (400, "invalid_request_error")
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="../../keys.sqlite", endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        client.files.content("..%2F..%2Fkeys.sqlite")


def test_files_and_batches_belong_to_their_key(queen: RunningQueen, client: openai.OpenAI) -> None:
    batch = start(client, lines("mine"))
    over(client, batch)
    with openai.OpenAI(base_url=f"{queen.url}/v1", api_key=make_key(queen, "stranger"), max_retries=0) as stranger:
        assert stranger.files.list().data == []
        assert stranger.batches.list().data == []
        for ask in (stranger.batches.retrieve, stranger.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                ask(batch)
        with pytest.raises(openai.NotFoundError):
            stranger.files.content(client.batches.retrieve(batch).input_file_id)


def test_a_cancelled_batch_keeps_what_it_has() -> None:
    with running_queen() as queen, openai.OpenAI(base_url=f"{queen.url}/v1", api_key="none", max_retries=0) as client:
        slow_worker(queen)
        batch = start(client, lines(*["a b c d e"] * 200))
        until(lambda: completed(client, batch) > 0, "a line to be answered")
        with pytest.raises(openai.BadRequestError, match="cancel"):
            client.files.delete(client.batches.retrieve(batch).input_file_id)
        assert client.batches.cancel(batch).status in ("cancelling", "cancelled", "finalizing")
        done = over(client, batch)
        counts = done.request_counts
        assert done.status == "cancelled"
        assert counts.total == 200
        assert 0 < counts.completed < 200
        assert len(read(client, done.output_file_id)) == counts.completed
        errors = read(client, done.error_file_id)
        assert len(errors) == counts.failed == 200 - counts.completed
        assert {error["error"]["code"] for error in errors} <= {"batch_cancelled", "cancelled"}
        with pytest.raises(openai.BadRequestError):
            client.batches.cancel(batch)


def test_a_batch_goes_on_after_the_queen_was_killed(tmp_path: Any) -> None:
    with running_queen(home=tmp_path) as queen:
        slow_worker(queen)
        with openai.OpenAI(base_url=f"{queen.url}/v1", api_key="none", max_retries=0) as client:
            batch = start(client, lines(*[f"a b {n}" for n in range(60)]))
            until(lambda: completed(client, batch) > 3, "some lines to be answered")
            queen.process.kill()
            queen.process.wait()
    with (
        running_queen(home=tmp_path) as queen,
        openai.OpenAI(base_url=f"{queen.url}/v1", api_key="none", max_retries=0) as client,
    ):
        done = over(client, batch)
        assert (done.status, done.request_counts.completed) == ("completed", 60), read(client, done.error_file_id)[:2]
        answers = read(client, done.output_file_id)
        texts = [answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers]
        assert texts == [f"a b {n}" for n in range(60)]
    assert rows(tmp_path, "SELECT count(*), count(DISTINCT job) FROM usage") == [(60, 60)]
    assert rows(tmp_path, "SELECT count(*) FROM jobs WHERE body IS NOT NULL OR response IS NOT NULL") == [(0,)]
