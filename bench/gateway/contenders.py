"""Starts the upstream and the gateways before it, each on a free port of the loopback address."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.worker.contenders import family, free_port
from rbee.process_memory import family_memory_bytes
from rbee.queen.keys import KeyStore
from rbee.queen.policy import Policy
from rbee.testing.programs import end, running_queen, until

HERE = Path(__file__).parent
DIRECT, NGINX, NGINX_2, LITELLM, RBEE, RBEE_2 = "direct", "nginx-1", "nginx-2", "litellm", "rbee-1", "rbee-2"
NAMES = (DIRECT, NGINX, NGINX_2, RBEE, RBEE_2, LITELLM)
MODEL = "mock"
LITELLM_KEY = "sk-bench-0123456789abcdef0123456789abcdef"
START_S = 120.0
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
"""Where programs are looked for; Debian's nginx is not where a person's shell looks."""
SLOTS = 1000
"""How many jobs the queen gives the upstream at once: more than there are clients, so that none waits in her queue."""
SCRIPT = """\
fn route_task(task, workers) {
    if task.customer_tier == "enterprise" {
        return workers.filter(|w| w.gpu_type == "H100").least_loaded();
    }
    workers.filter(|w| w.loaded && w.load < 1.0).least_loaded()
}
"""


class NotHere(Exception):
    """A contender that this machine does not have; the text says what is missing."""


@dataclass(frozen=True)
class Contender:
    """Something that answers chat completions at 127.0.0.1:`port`. `pids` are the first processes of its trees."""

    name: str
    port: int
    pids: Sequence[int]
    headers: Mapping[str, str] = field(default_factory=dict)

    def cpu_s(self) -> float:
        """Return the CPU time that its processes have taken so far (proc(5))."""
        ticks = 0
        for pid in (one for root in self.pids for one in family(root)):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self) -> int:
        """Return the resident memory of its processes, pages that they share counted in each."""
        return sum(family_memory_bytes(pid) for pid in self.pids)


@contextlib.contextmanager
def all_running(names: Sequence[str], litellm: Path | None, upstream: Contender) -> Iterator[list[Contender]]:
    """Start the named contenders before the upstream and end them all; what is not here is left out with a word."""
    starts = {
        NGINX: lambda: nginx(NGINX, upstream.port, 1),
        NGINX_2: lambda: nginx(NGINX_2, upstream.port, 2),
        RBEE: lambda: queen(RBEE, upstream.port),
        RBEE_2: lambda: queen_of_two(RBEE_2, upstream.port),
        LITELLM: lambda: litellm_proxy(LITELLM, upstream.port, litellm),
    }
    with contextlib.ExitStack() as stack:
        running = [upstream]
        for name in names:
            try:
                if name != DIRECT:
                    running.append(stack.enter_context(starts[name]()))
            except NotHere as missing:
                print(f"{name} is left out: {missing}", flush=True)
        yield running


def versions(litellm: Path | None) -> str:
    """Return the versions of the programs that are no Python packages of this environment."""
    ask_litellm = "from importlib.metadata import version; print('litellm version', version('litellm'))"
    asked: list[list[str | Path]] = [["nginx", "-v"], ["wrk", "-v"], ["redis-server", "-v"]]
    asked += [[litellm.parent / "python", "-c", ask_litellm]] if litellm else []
    told = []
    for command in asked:
        with contextlib.suppress(OSError):
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": PATH}
            )
            told += re.findall(r"^(?:nginx|wrk|Redis|litellm)\b.*?\d[\w.+~-]*", done.stdout + done.stderr, re.MULTILINE)
    return ", ".join(told)


def compiled(name: str, folder: Path) -> Path:
    """Compile a C program of this folder. Raises: SystemExit when there is no compiler, or it refuses the file."""
    compiler = shutil.which("cc")
    if compiler is None:
        sys.exit("There is no C compiler: apt install gcc libc6-dev")
    subprocess.run([compiler, "-O2", "-o", folder / name, HERE / f"{name}.c"], check=True)
    return folder / name


@contextlib.contextmanager
def mock(program: Path, *, tokens: int = 64, rate: int = 0, work_us: int = 0) -> Iterator[Contender]:
    """Run the upstream; asked directly, it is the limit of what can be measured."""
    options = f"0 --tokens {tokens} --rate {rate} --work {work_us}"
    command: list[str | Path] = [program, *options.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout
            yield Contender(DIRECT, int(process.stdout.readline().split()[-1]), [process.pid])
        finally:
            end(process)


@contextlib.contextmanager
def started(name: str, command: Sequence[str | Path], port: int, folder: Path, **env: str) -> Iterator[int]:
    """Run a server until it is not needed any more. Yields its process id once the port takes connections."""
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=folder, env={**os.environ, **env}, start_new_session=True, text=True
        )
    try:
        until(lambda: process.poll() is not None or connects(port), f"{name} to listen", START_S)
        if process.poll() is not None:
            raise RuntimeError(
                f"{name} ended with code {process.returncode}:\n{log.read_text(errors='replace')[-4000:]}"
            )
        yield process.pid
    finally:
        end(process)


def connects(port: int) -> bool:
    """Tell whether something listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def nginx(name: str, upstream: int, workers: int) -> Iterator[Contender]:
    """Run nginx as a plain proxy that keeps its connections open and passes streams on as they come."""
    program = shutil.which("nginx", path=PATH)
    if program is None:
        raise NotHere("no nginx (apt install nginx)")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="rbee-bench-nginx-") as place:
        folder = Path(place)
        text = (HERE / "nginx.conf").read_text()
        for word, value in (("FOLDER", place), ("WORKERS", workers), ("UPSTREAM", upstream), ("PORT", port)):
            text = text.replace(f"@{word}@", str(value))
        (folder / "nginx.conf").write_text(text)
        command: list[str | Path] = [program, "-e", folder / "error.log", "-p", folder, "-c", folder / "nginx.conf"]
        with started("nginx", command, port, folder) as pid:
            yield Contender(name, port, [pid])


@contextlib.contextmanager
def litellm_proxy(name: str, upstream: int, program: Path | None) -> Iterator[Contender]:
    """Run LiteLLM's proxy with one worker and a master key, without a database."""
    if program is None or not program.exists():
        raise NotHere(f"there is no {program}" if program else "--litellm was not given")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="rbee-bench-litellm-") as place:
        folder = Path(place)
        text = (HERE / "litellm.yaml").read_text().replace("@UPSTREAM@", str(upstream)).replace("@KEY@", LITELLM_KEY)
        (folder / "litellm.yaml").write_text(text)
        options = f"--host 127.0.0.1 --port {port} --num_workers 1 --telemetry False --config litellm.yaml"
        quiet = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        with started("litellm", [program.absolute(), *options.split()], port, folder, **quiet) as pid:
            yield Contender(name, port, [pid], {"Authorization": f"Bearer {LITELLM_KEY}"})


@contextlib.contextmanager
def queen(name: str, upstream: int, *more: str, beside: Sequence[int] = ()) -> Iterator[Contender]:
    """Run a queen with a key that is asked for, a routing script, records and metrics, and no hive."""
    with tempfile.TemporaryDirectory(prefix="rbee-bench-queen-") as place:
        home, inventory = Path(place) / "home", Path(place) / "inventory"
        home.mkdir()
        inventory.mkdir()
        worker = f"Worker mock url=http://127.0.0.1:{upstream}/v1 model={MODEL} slots={SLOTS}"
        (inventory / "fleet.conf").write_text(f"Host upstream\n  HivePort none\n  {worker}\n")
        (inventory / "scheduler.rhai").write_text(SCRIPT)
        options = ["--no-hive", "--require-key", "--inventory", str(inventory), *more]
        with running_queen(*options, home=home) as running:
            _, key = KeyStore(home / "state" / "keys.sqlite").create("bench", policy=Policy(tenant="bench"))
            port, headers = int(running.url.rpartition(":")[2]), {"Authorization": f"Bearer {key}"}
            found = Contender(name, port, [running.process.pid, *beside], headers)
            until(lambda: knows_the_upstream(found), "the queen to reach the upstream", START_S)
            yield found


@contextlib.contextmanager
def queen_of_two(name: str, upstream: int) -> Iterator[Contender]:
    """Run a queen of two server processes, with a Redis server of their own between them."""
    told = subprocess.run([sys.executable, "-m", "rbee.queen", "run", "--help"], capture_output=True, check=True)
    program = shutil.which("redis-server")
    if not re.search(rb"^\s*--processes\b", told.stdout, re.MULTILINE):
        raise NotHere("this rbee has no --processes")
    if program is None:
        raise NotHere("no redis-server (apt install redis-server)")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="rbee-bench-redis-") as folder:
        command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
        with (
            started("redis-server", command, port, Path(folder)) as pid,
            queen(name, upstream, "--processes", "2", "--state", f"redis://127.0.0.1:{port}", beside=[pid]) as found,
        ):
            yield found


def knows_the_upstream(contender: Contender) -> bool:
    """Tell whether a queen has reached the upstream; of several server processes, each answers some connections."""
    for _ in range(16):
        connection = http.client.HTTPConnection("127.0.0.1", contender.port, timeout=30)
        try:
            connection.request("GET", "/v1/models", headers=dict(contender.headers))
            if b'"loaded":["upstream/mock"]' not in connection.getresponse().read():
                time.sleep(0.05)
                return False
        finally:
            connection.close()
    return True
