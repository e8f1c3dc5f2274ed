"""A server of a model that does what no good one does, and a port that nobody has a reason to call."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class HostileServer:
    """A server that lists the model honey and answers as its fields say; `seen` are the jobs that it was sent."""

    url: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    drop: bool = False
    probe_status: int = 200
    seen: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def says(self, value: Any, status: int = 200, **headers: str) -> None:
        """Answer jobs like this from here on."""
        self.body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.status, self.drop = status, False
        self.headers = {name.replace("_", "-"): text for name, text in headers.items()}

    def uses(self, prompt: str, completion: str, *, stream: bool = False) -> None:
        """Say `hi` with this usage, whose numbers are written as they are given."""
        usage = b'"usage": {"prompt_tokens": %s, "completion_tokens": %s}' % (prompt.encode(), completion.encode())
        if not stream:
            message = b'"choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}}]'
            self.says(b"{" + message + b", " + usage + b"}")
            return
        delta = b'data: {"choices": [{"index": 0, "delta": {"content": "hi"}}]}\n\n'
        self.says(
            delta + b'data: {"choices": [], ' + usage + b"}\n\ndata: [DONE]\n\n", Content_Type="text/event-stream"
        )


@contextlib.contextmanager
def hostile_server() -> Iterator[HostileServer]:
    """Run one."""
    told = HostileServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(told.probe_status, b'{"object": "list", "data": [{"id": "honey"}]}')

        def do_POST(self) -> None:
            told.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            told.seen.append({name.lower(): value for name, value in self.headers.items()})
            if told.drop:
                self.close_connection = True
                return
            self._answer(told.status, told.body)

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | told.headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        told.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield told
        finally:
            server.shutdown()
            thread.join()


class Trap:
    """A port that counts whoever connects."""

    def __init__(self) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.sock.setblocking(False)
        self.at = f"127.0.0.1:{self.sock.getsockname()[1]}"
        self.url = f"http://{self.at}"

    @property
    def called(self) -> bool:
        """Return True when somebody has connected: the kernel takes connections without our doing anything."""
        try:
            self.sock.accept()[0].close()
        except BlockingIOError:
            return False
        return True


@contextlib.contextmanager
def trap() -> Iterator[Trap]:
    found = Trap()
    with found.sock:
        yield found
