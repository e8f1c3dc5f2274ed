"""A Redis of a test's own, and queens that share it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from queen_rig import free_port

from rbee.testing.programs import until


def redis_server() -> str:
    """Return the program. Skips the test where it is not installed, or fails it where RBEE_REQUIRE_HOSTS=1."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        absent = pytest.fail if os.environ.get("RBEE_REQUIRE_HOSTS") == "1" else pytest.skip
        absent("redis-server is not installed: apt-get install redis-server")
    assert found is not None
    return found


@dataclass
class RunningRedis:
    """A server that keeps nothing on the disk."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=5)

    def kill(self) -> None:
        """End it without a word."""
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        """Start it again at the same port, empty, when it was killed."""
        command = [redis_server(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
        until(self.answers, "Redis to answer")

    def answers(self) -> bool:
        with contextlib.suppress(redis.RedisError), self.client() as client:
            return bool(client.ping())
        return False

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Let it hang: it takes connections and bytes, and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def running_redis() -> Iterator[RunningRedis]:
    """Run a Redis, and end it."""
    redis_server()
    running = RunningRedis.__new__(RunningRedis)
    running.port = free_port()
    running.start()
    try:
        yield running
    finally:
        running.process.send_signal(signal.SIGCONT)
        running.kill()


def inventory(folder: Path, more: str = "", **urls: str) -> Path:
    """Write an inventory whose workers, all of the model echo, are the servers at these addresses."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"  Worker {name} model=echo url={url}\n" for name, url in urls.items())
    (folder / "hives.conf").write_text(f"IgnoreUnknown *\nHost desk\n  HivePort none\n{lines}{more}")
    return folder
