"""Starts what is compared, all on the same model file, the same number of threads and the same context."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rbee.client import Client
from rbee.errors import RbeeError
from rbee.testing.programs import RunningQueen, end, running_queen, until
from rbee.testing.workers import run_worker
from rbee.wire.fleet import AddModel, HiveReport, ModelReport, SpawnWorker, WorkerAccess, WorkerReport, WorkerSpec

ENGINE, WORKER, QUEEN = "xllamacpp engine alone", "xllamacpp worker", "xllamacpp worker through the queen"
LLAMA_WORKER = "llama-cpp-python worker"
SERVER, TUNED_SERVER = "llama_cpp.server", "llama_cpp.server, tuned"
MODEL = "random"
CONTEXT_TOKENS = 1024
START_S = 120.0


@dataclass(frozen=True)
class Contender:
    """Something that answers chat completions. `url` is http://host:port or unix:/path; `pid` is its first process."""

    name: str
    pid: int
    url: str
    token: str = ""

    def cpu_s(self) -> float:
        """Return the CPU time that its processes have taken so far (proc(5))."""
        ticks = 0
        for pid in family(self.pid):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def all_running(model: Path, slots: int, threads: int) -> Iterator[list[Contender]]:
    """Start every contender and end them all."""
    with contextlib.ExitStack() as stack:
        queen = stack.enter_context(running_queen())
        access = spawn(queen, model, slots, threads)
        spec = WorkerSpec(
            name="other",
            backend="llama-cpp-python",
            model=MODEL,
            path=str(model),
            context_tokens=CONTEXT_TOKENS,
            slots=slots,
            threads=threads,
        )
        other = stack.enter_context(run_worker(spec))
        yield [
            Contender(ENGINE, queen.process.pid, access.engine_url, access.token),
            Contender(WORKER, queen.process.pid, access.url, access.token),
            Contender(QUEEN, queen.process.pid, queen.url, queen.record.token),
            Contender(LLAMA_WORKER, other.process.pid, other.url, other.spec.token),
            stack.enter_context(llama_cpp_server(model, threads)),
            stack.enter_context(llama_cpp_server(model, threads, tuned=True)),
        ]


def spawn(queen: RunningQueen, model: Path, slots: int, threads: int) -> WorkerAccess:
    """Start an xllamacpp worker through the queen and return how it is reached directly."""
    hive = queen.status().hives[0].hive
    queen.client.post(f"/v1/hives/{hive}/models", AddModel(path=str(model), name=MODEL), ModelReport)
    wanted = SpawnWorker(model=MODEL, backend="xllamacpp", slots=slots, threads=threads, context_tokens=CONTEXT_TOKENS)
    queen.client.post(f"/v1/hives/{hive}/workers", wanted, WorkerReport)

    def ready() -> list[WorkerReport]:
        return [worker for worker in queen.status().hives[0].workers if worker.state == "ready"]

    until(ready, "the worker to become ready", START_S)
    access = queen.client_of_hive().get("/v1/hive", HiveReport).workers[0].access
    assert access is not None, "a hive tells how its ready worker is reached"
    return access


@contextlib.contextmanager
def llama_cpp_server(model: Path, threads: int, *, tuned: bool = False) -> Iterator[Contender]:
    """Run llama-cpp-python's own server.

    As it comes, a second request cuts off the answer that runs; when `tuned`, requests wait for each other instead, and
    OpenMP's threads spin no longer than those of rbee's llama-cpp-python worker (see that plugin's README).
    """
    port = free_port()
    options = {
        "model": model,
        "model_alias": MODEL,
        "host": "127.0.0.1",
        "port": port,
        "n_ctx": CONTEXT_TOKENS,
        "n_threads": threads,
        "n_threads_batch": threads,
        "interrupt_requests": not tuned,
        "verbose": False,
    }
    command = [sys.executable, "-m", "llama_cpp.server"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    env = {**os.environ, "GOMP_SPINCOUNT": "1000"} if tuned else None
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, env=env)
    url = f"http://127.0.0.1:{port}"
    try:
        client = Client(url)
        until(lambda: answers(client, process), "llama_cpp.server to answer", START_S)
        client.close()
        yield Contender(TUNED_SERVER if tuned else SERVER, process.pid, url)
    finally:
        end(process)


def answers(client: Client, process: subprocess.Popen[str]) -> bool:
    """Tell whether the server lists its model. Raises: RuntimeError when it has ended."""
    if process.poll() is not None:
        raise RuntimeError(
            f"llama_cpp.server ended with code {process.returncode}; is llama-cpp-python[server] installed?"
        )
    try:
        client.send("GET", "/v1/models").close()
    except RbeeError:
        time.sleep(0.1)
        return False
    return True


def family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
    ]
    return [pid, *(one for child in children for one in family(child))]


def free_port() -> int:
    """Return a port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
