"""Attacks with HTTP itself, by their numbers in docs/security.md: smuggled, endless and slow requests, many of them."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from attack_rig import CHAT, Victim, chat, dialled, memory_bytes, raw, server_process, serving, victim
from queen_rig import FleetFolder

from rbee.testing.programs import RunningQueen

MIB = 1024 * 1024
NEXT = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
POST = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /v1/models HTTP/1.1\r\n"


@pytest.fixture(scope="module")
def queen() -> Iterator[RunningQueen]:
    with victim() as found:
        yield found.queen


SMUGGLED = {
    "a length and chunks": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and a length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}",
    "the same length twice": POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "a list of lengths": POST + b"Content-Length: 2, 2\r\n\r\n{}",
    "a length with a sign": POST + b"Content-Length: +2\r\n\r\n{}",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n",
    "a length with a space before the colon": POST + b"Content-Length : 2\r\n\r\n{}",
    "another coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunks in another coding": POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunks twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two hosts": GET + b"Host: localhost\r\nHost: evil.example\r\n\r\n",
    "no host": GET + b"Accept: */*\r\n\r\n",
    "a folded header": GET + b"Host: localhost\r\nX-A: b\r\n c\r\n\r\n",
    "a folded length": POST + b"Content-Length:\r\n 2\r\n\r\n{}",
    "lines that end with LF": GET.replace(b"\r", b"") + b"Host: localhost\n\n",
    "one line that ends with LF": GET + b"Host: localhost\nX-A: b\r\n\r\n",
    "a header in a bare CR": GET + b"Host: localhost\rX-A: b\r\n\r\n",
    "a NUL": GET + b"Host: localhost\r\nX-A: \0\r\n\r\n",
    "no version": b"GET /v1/models\r\nHost: localhost\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "too many headers": GET + b"Host: localhost\r\n" + b"X-A: b\r\n" * 100 + b"\r\n",
    "a chunk length that is no number": CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n",
    "a chunk length with a sign": CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n",
    "a chunk length that overflows": CHUNKED + b"10000000000000002\r\n{}\r\n0\r\n\r\n",
    "a chunk that ends elsewhere": CHUNKED + b"2\r\n{}xx\r\n0\r\n\r\n",
    "chunks whose lines end with LF": CHUNKED + b"2\n{}\n0\n\n",
    "an endless chunk extension": CHUNKED + b"2;" + b"a" * 100_000 + b"\r\n{}\r\n0\r\n\r\n",
    "an endless trailer": CHUNKED + b"2\r\n{}\r\n0\r\n" + b"X-A: b\r\n" * 10_000 + b"\r\n",
}


@pytest.mark.parametrize("what", SMUGGLED)
def test_6_what_could_be_read_in_two_ways_is_refused_and_nothing_after_it_is_served(
    queen: RunningQueen, what: str
) -> None:
    answer = raw(queen, SMUGGLED[what] + NEXT)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 "), answer[:300]
    assert b"Connection: close" in head
    error = json.loads(body)["error"]  # one answer and no more
    assert (error["type"], error["code"]) == ("invalid_request_error", "bad_request")
    assert set(error) == {"message", "type", "param", "code"}


def test_6_a_request_that_comes_after_the_refusal_is_not_served_either(queen: RunningQueen) -> None:
    for bad in (CHUNKED + b"zz\r\n", GET + b"\r\n"):
        with dialled(queen) as sock:
            sock.sendall(bad)
            assert sock.recv(65536).startswith(b"HTTP/1.1 400 ")
            answer = b""
            with contextlib.suppress(ConnectionError):
                sock.sendall(NEXT)
                while came := sock.recv(65536):
                    answer += came
            assert b"HTTP/1.1" not in answer


def test_6_what_is_only_unusual_is_read_as_it_should_be(queen: RunningQueen) -> None:
    body = b"2;name=value\r\n{}\r\n00\r\nContent-Length: 500\r\nX-Admin: yes\r\n\r\n"
    answers = raw(queen, CHUNKED + body + NEXT)
    assert answers.count(b"HTTP/1.1 ") == 2, answers
    assert b"you must provide a 'body' parameter" in answers or b"you must provide" in answers
    assert b'"status":"ok"' in answers
    pipelined = raw(queen, NEXT.replace(b"Connection: close\r\n", b"") * 50 + NEXT)
    assert pipelined.count(b'"status":"ok"') == 51
    assert not [line for line in queen.log if "Traceback" in line]


def flooded(queen: RunningQueen, head: bytes, piece: bytes) -> bytes:
    """Send a piece again and again, a gigabyte in all, until the queen has had enough; return her answer."""
    with dialled(queen) as sock:
        sock.sendall(head)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 1000 * MIB:
                sock.sendall(piece)
                sent += len(piece)
        assert sent < 1000 * MIB, "the queen took a gigabyte"
        with contextlib.suppress(ConnectionError):
            return sock.recv(65536)
        return b""


def posted(queen: RunningQueen, body: bytes) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return raw(queen, head.encode() + body)


def with_field(value: bytes) -> bytes:
    return json.dumps(chat()).encode()[:-1] + b', "metadata": {"a": ' + value + b"}}"


LARGE = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()
UNREAD = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
HUGE: dict[str, tuple[bytes, Callable[[RunningQueen], bytes]]] = {
    "a gigabyte": (b"413", lambda q: flooded(q, LARGE + b"Content-Length: 1000000000\r\n\r\n", b"x" * 65536)),
    "endless chunks": (
        b"413",
        lambda q: flooded(q, LARGE + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"),
    ),
    "endless chunks of a byte": (
        b"413",
        lambda q: flooded(q, LARGE + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 10_000),
    ),
    "a gigabyte that nobody reads": (
        b"200",
        lambda q: flooded(q, UNREAD + b"Content-Length: 1000000000\r\n\r\n", b"x" * 65536),
    ),
    "lists 10,000 deep": (b"400", lambda q: posted(q, with_field(b"[" * 10_000 + b"]" * 10_000))),
    "objects 10,000 deep": (b"400", lambda q: posted(q, with_field(b'{"a":' * 10_000 + b"1" + b"}" * 10_000))),
    "a million messages": (b"400", lambda q: posted(q, b'{"messages": [' + b",".join([b"{}"] * 1_000_000) + b"]}")),
    "a million messages of text": (
        b"413",
        lambda q: posted(q, json.dumps(chat() | {"messages": chat()["messages"] * 1_000_000}).encode()),
    ),
    "a million empty lists": (b"400", lambda q: posted(q, with_field(b"[" + b"[]," * 1_000_000 + b"1]"))),
    "a million fields": (
        b"400",
        lambda q: posted(q, b"{" + b",".join(b'"%x":1' % n for n in range(350_000)) + b', "n": 5.0}'),
    ),
    "a million texts": (b"400", lambda q: posted(q, with_field(b"[" + b'"a",' * 1_000_000 + b"1]"))),
    "numbers that are no whole ones": (
        b"400",
        lambda q: posted(q, b'{"n": 5.0, "messages": [' + b"{}," * 80_000 + b"{}]}"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HUGE)
def test_7_a_huge_request_costs_neither_memory_nor_the_neighbours(queen: RunningQueen, what: str) -> None:
    status, attack = HUGE[what]
    pid = server_process(queen)
    with open(f"/proc/{pid}/clear_refs", "w") as file:
        file.write("5")  # begin the high-water mark anew (proc(5))
    before = memory_bytes(pid)
    with neighbour(lambda: raw(queen, NEXT).startswith(b"HTTP/1.1 200 ")) as served:
        answer = attack(queen)
        while not served:
            time.sleep(0.01)
    assert all(served)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 " + status), answer[:300]
    assert memory_bytes(pid, "VmHWM") - before <= 50 * MIB
    assert server_process(queen) == pid
    assert not [line for line in queen.log if "Traceback" in line]


@contextlib.contextmanager
def neighbour(ask: Callable[[], bool]) -> Iterator[list[bool]]:
    """Ask the same thing all the while, and note whether it was answered well."""
    served: list[bool] = []
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            served.append(ask())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield served
    finally:
        over.set()
        thread.join(60)


FORM = b"Content-Type: multipart/form-data; boundary=B\r\nContent-Length: 100000\r\n\r\n"
SLOW = {
    "a head": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-A: ",
    "a body": LARGE + b"Content-Length: 100000\r\n\r\n{",
    "a chunked body": LARGE + b"Transfer-Encoding: chunked\r\n\r\n",
    "a form": b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\n" + FORM,
    "a file": b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\n" + FORM
    + b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n',
}  # fmt: skip


def trickled(queen: RunningQueen, begin: bytes, byte: bytes) -> bytes:
    """Send a byte a second, and return what comes back."""
    with dialled(queen) as sock:
        sock.sendall(begin)
        sock.settimeout(1.0)
        until = time.monotonic() + 120
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < until:
                try:
                    return sock.recv(65536)
                except TimeoutError:
                    sock.sendall(byte)
    return b""


def test_7_a_request_that_comes_a_byte_a_second_is_ended(queen: RunningQueen) -> None:
    answers: dict[str, bytes] = {}

    def attack(what: str) -> None:
        byte = b"1\r\nx\r\n" if "chunked" in what else b"x"
        answers[what] = trickled(queen, SLOW[what], byte)

    threads = [threading.Thread(target=attack, args=(what,)) for what in SLOW]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    for what, answer in answers.items():
        assert answer.startswith(b"HTTP/1.1 408 "), (what, answer[:300])
        assert b"Connection: close" in answer
        assert b'"code":"request_timeout"' in answer
    assert len(answers) == len(SLOW)


def test_8_idle_connections_and_slow_readers_harm_nobody(fleet: FleetFolder) -> None:
    with serving(fleet) as (found, _), contextlib.ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(dialled(found.queen))
        body = json.dumps(chat("word " * 100_000, stream=True)).encode()
        request = LARGE + b"Content-Length: %d\r\n\r\n" % len(body) + body
        lazy = [lazy_reader(stack, found, request) for _ in range(20)]
        key = found.key()
        for _ in range(50):
            told = found.ask("POST", CHAT, chat(), Authorization=f"Bearer {key}")
            assert told.status == 200
            assert b"one two three" in told.body
        for sock in lazy:
            assert sock.recv(1) == b"H", "it was cut although it has taken nothing for a moment only"
        assert not [line for line in found.queen.log if "Traceback" in line]


def lazy_reader(stack: contextlib.ExitStack, found: Victim, request: bytes) -> socket.socket:
    """Ask for a long answer and take nothing of it."""
    sock = stack.enter_context(socket.socket())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(60)
    sock.connect(("127.0.0.1", found.port))
    sock.sendall(request)
    return sock
