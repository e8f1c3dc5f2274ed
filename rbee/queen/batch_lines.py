"""Read and check the input file of a batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import gevent
import msgspec
from msgspec import Struct

from rbee.errors import RbeeError
from rbee.wire.jobs import BatchLine, BatchProblem
from rbee.wire.openai import MAX_BODY_BYTES, decode, parse

MAX_LINES = 50_000
MAX_PROBLEMS = 100
LINES_AT_ONCE = 50
MAX_LINE_BYTES = MAX_BODY_BYTES + 8192

_decoder = msgspec.json.Decoder(BatchLine)


class Line(Struct, frozen=True):
    """One request of a batch: where its body lies in the file. Lines count from 1."""

    number: int
    custom_id: str
    model: str
    at_byte: int
    size_bytes: int


def check_file(path: Path, endpoint: str) -> tuple[list[Line], list[BatchProblem]]:
    """Return the lines of a file and what is wrong with it. Raises: OSError.

    It works in pieces in other threads, so that a large file holds nobody up.
    """
    lines: list[Line] = []
    problems: list[BatchProblem] = []
    seen: set[str] = set()
    with path.open("rb") as file:
        numbered = _numbered(file)
        pool = gevent.get_hub().threadpool
        while some := pool.apply(_some, (numbered,)):
            pool.apply(_check_some, (some, endpoint, lines, problems, seen))
            if len(lines) > MAX_LINES:
                problems = [BatchProblem(message=f"The file has more than {MAX_LINES} lines", code="too_many_lines")]
            if len(problems) >= MAX_PROBLEMS or len(lines) > MAX_LINES:
                break
            gevent.sleep(0)
    if not lines and not problems:
        problems.append(BatchProblem(message="The input file is empty", code="empty_file"))
    return lines, problems


def _numbered(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    number, at = 0, 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if line.strip():
            yield number, at, line
        at += len(line)


def _some(numbered: Iterator[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    return list(itertools.islice(numbered, LINES_AT_ONCE))


def _check_some(
    some: list[tuple[int, int, bytes]], endpoint: str, lines: list[Line], problems: list[BatchProblem], seen: set[str]
) -> None:
    for number, at, text in some:
        try:
            lines.append(_check(number, at, text, endpoint, seen))
        except RbeeError as problem:
            problems.append(
                BatchProblem(message=str(problem), code=problem.code or "invalid", line=number, param=problem.param)
            )


def _check(number: int, at: int, text: bytes, endpoint: str, seen: set[str]) -> Line:
    if len(text) > MAX_LINE_BYTES:
        raise _problem(f"The line is longer than {MAX_LINE_BYTES} bytes", "line_too_long", None)
    line = parse(text, _decoder)
    if line.url != endpoint:
        raise _problem(f"The line's url is {line.url[:80]!r}, but the batch's endpoint is {endpoint!r}",
                       "mismatched_url", "url")  # fmt: skip
    if line.custom_id in seen:
        raise _problem(f"The custom_id {line.custom_id!r} is not unique", "duplicate_custom_id", "custom_id")
    seen.add(line.custom_id)
    body = bytes(line.body)
    request = decode(endpoint, body)
    if request.stream:
        raise _problem("A line of a batch cannot stream", "invalid_value", "body.stream")
    return Line(number, line.custom_id, request.model, at + text.index(body), len(body))


def _problem(message: str, code: str, param: str | None) -> RbeeError:
    problem = RbeeError(message, param=param)
    problem.code = code  # type: ignore[misc]  # one class stands for every code of a line
    return problem
