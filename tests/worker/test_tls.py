"""Who is trusted between the programs of a fleet, and what a person is told when somebody is not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleet_certificates import Authority, make_authority

from rbee.errors import SetupProblem, TimedOut, Unreachable
from rbee.http.server import Response, Routes, Server
from rbee.http.tls import client_context, server_context
from rbee.http.upstream import Upstream

Serve = Callable[[Path], str]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return make_authority(tmp_path / "authority")


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers with the certificate in a folder; return the address."""
    servers: list[Server] = []

    def start(host: Path) -> str:
        routes = Routes()
        routes.add("GET", "/", lambda _: Response(b"x" * 300_000))
        servers.append(Server("127.0.0.1", 0, routes, tls=server_context(host / "host.crt", host / "host.key")))
        servers[-1].start()
        return f"https://127.0.0.1:{servers[-1].port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_fleets_own_are_trusted_and_connections_are_kept(
    authority: Authority, serve: Serve, tmp_path: Path
) -> None:
    upstream = Upstream(serve(authority.host(tmp_path / "host")), tls=authority.trusted)
    for _ in range(3):
        assert len(upstream.request("GET", "/").read()) == 300_000
    upstream.close()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("another authority", "certificate is refused"),
        ("expired", "certificate has expired"),
        ("another name", "certificate is not valid for '127.0.0.1'"),
    ],
)
def test_who_is_not_trusted_is_named_with_the_reason(
    authority: Authority, serve: Serve, tmp_path: Path, case: str, words: str
) -> None:
    names = ["elsewhere.example", "127.0.0.9"] if case == "another name" else ["127.0.0.1"]
    url = serve(authority.host(tmp_path / "host", names, days=-1 if case == "expired" else 1))
    trusted = make_authority(tmp_path / "stranger").trusted if case == "another authority" else authority.trusted
    with pytest.raises(Unreachable, match=words) as refusal:
        Upstream(url, tls=trusted).request("GET", "/")
    assert url in str(refusal.value)


def test_the_machines_own_authorities_do_not_count(authority: Authority) -> None:
    assert [one["subject"] for one in authority.trusted.get_ca_certs()] == [((("commonName", "fleet"),),)]


def test_a_server_without_tls_is_told_as_such(authority: Authority) -> None:
    server = Server("127.0.0.1", 0, Routes())
    server.start()
    with pytest.raises(Unreachable, match="TLS"):
        Upstream(f"https://127.0.0.1:{server.port}", tls=authority.trusted).request("GET", "/")
    server.shutdown()
    server.server_close()


def test_a_server_that_says_nothing_is_given_up(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(Unreachable, match="timed out"):
            Upstream(url, tls=authority.trusted, connect_timeout_s=0.2).request("GET", "/")


def test_a_server_that_stops_in_the_middle_of_its_answer(authority: Authority, tmp_path: Path) -> None:
    host = authority.host(tmp_path / "host")
    context = server_context(host / "host.crt", host / "host.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            raw, _ = listener.accept()
            with context.wrap_socket(raw, server_side=True) as secured:
                secured.recv(1000)
                secured.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
                secured.recv(1000)

        threading.Thread(target=answer, daemon=True).start()
        upstream = Upstream(f"https://127.0.0.1:{listener.getsockname()[1]}", tls=authority.trusted)
        with pytest.raises(TimedOut):
            upstream.request("GET", "/").read(timeout_s=0.2)


def test_files_that_cannot_be_used_are_named(authority: Authority, tmp_path: Path) -> None:
    host = authority.host(tmp_path / "host")
    other = authority.host(tmp_path / "other")
    with pytest.raises(SetupProblem, match="/nowhere"):
        client_context(Path("/nowhere/ca.crt"))
    (tmp_path / "noise").write_text("noise")
    with pytest.raises(SetupProblem, match="noise"):
        client_context(tmp_path / "noise")
    with pytest.raises(SetupProblem, match="key values mismatch"):
        server_context(host / "host.crt", other / "host.key")


def test_it_works_on_gevents_sockets(authority: Authority, serve: Serve, tmp_path: Path) -> None:
    url = serve(authority.host(tmp_path / "host"))
    stranger = make_authority(tmp_path / "stranger")
    code = (
        "from gevent import monkey; monkey.patch_all()\n"
        "import sys, pathlib, gevent\n"
        "from rbee.http.tls import client_context\n"
        "from rbee.http.upstream import Upstream\n"
        "url, ours, strange = sys.argv[1:]\n"
        "upstream = Upstream(url, tls=client_context(pathlib.Path(ours)))\n"
        "jobs = [gevent.spawn(lambda: len(upstream.request('GET', '/').read())) for _ in range(20)]\n"
        "print({job.get(timeout=60) for job in jobs})\n"
        "try: Upstream(url, tls=client_context(pathlib.Path(strange))).request('GET', '/')\n"
        "except Exception as problem: print(type(problem).__name__, problem)\n"
    )
    command = [sys.executable, "-c", code, url, str(authority.file), str(stranger.file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=dict(os.environ))
    assert done.stdout.startswith("{300000}\nUnreachable")
    assert "certificate is refused" in done.stdout
