"""Time how long a fault is felt: clients keep asking while a worker or a hive dies, stands, or cannot be reached.

usage: python -m bench.faults [--rounds N]
"""

# gevent has to be first: the clients here are greenlets.
from gevent import monkey

monkey.patch_all()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import http.client  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from urllib.parse import urlsplit  # noqa: E402

import gevent  # noqa: E402
from gevent.pool import Group  # noqa: E402

sys.path += [str(Path(__file__).parents[2] / "tests"), str(Path(__file__).parents[2] / "tests" / "queen")]

from queen_rig import FleetFolder, until_state  # noqa: E402

from bench.figures import conditions, ratio, spread, table  # noqa: E402
from rbee.testing.fleet import WORKER, RunningHive  # noqa: E402
from rbee.testing.openai_server import RunningServer, running_server  # noqa: E402
from rbee.testing.programs import RunningQueen, running_queen, until  # noqa: E402

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "honey", "messages": [{"role": "user", "content": "one two three"}]})
EVERY_S = 0.02
HELD_UP_S = 0.5
"""A request that took longer has felt the fault."""
WATCHED_S = 12.0
SLOTS, JOB_S, WINDOW_S, OVERLOAD = 8, 0.5, 8.0, 10

Target = RunningServer | RunningHive
Break = Callable[[Target], contextlib.AbstractContextManager[None]]
Kind = Callable[[contextlib.ExitStack], tuple[RunningQueen, dict[str, Target]]]
Asked = list[tuple[float, float, str]]
"""When each request began and ended, and which worker answered it well, if any."""


@dataclass
class Felt:
    """What clients felt of one fault, in seconds from it."""

    held_up_until: float
    longest: float
    failed: int


def main() -> None:
    """Print a table of the faults, and one of the overload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(conditions(["rbee", "gevent", "gunicorn"]), "\n")
    faults = {"killed": killed, "stands (SIGSTOP)": stopped}
    if os.geteuid() == 0 and shutil.which("nft"):
        faults["out of reach (packets vanish)"] = cut_off
    else:
        print("Only root can make packets vanish: that row is left out.", file=sys.stderr)
    kinds: dict[str, Kind] = {"a server": servers, "a host with hive and worker": hosts}
    cases = {f"{what} {name}": (kind, fault) for what, kind in kinds.items() for name, fault in faults.items()}
    felt: dict[str, list[Felt]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (kind, fault) in cases.items():
            felt[name].append(one_fault(kind, fault))
    head = ("of three, one is", "requests held up until, s", "longest request, s", "failed requests")
    print(table(head, [[name, *cells(some)] for name, some in felt.items()]), "\n")
    print(overload(rounds))


def cells(felt: list[Felt]) -> list[str]:
    """Return a row's cells: least, median, greatest."""
    return [
        spread(one.held_up_until for one in felt).text(2),
        spread(one.longest for one in felt).text(2),
        spread(float(one.failed) for one in felt).text(0),
    ]


@contextlib.contextmanager
def queen_of(slots: int, *urls: str) -> Iterator[RunningQueen]:
    """Run a queen with these servers, once all of them are ready."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "inventory")
        folder.mkdir()
        lines = [f"    Worker s{number} model=honey slots={slots} url={url}" for number, url in enumerate(urls)]
        text = ["IgnoreUnknown HivePort,Worker", "Host desk", "    HivePort none", *lines]
        (folder / "fleet.conf").write_text("\n".join(text) + "\n")
        with running_queen("--no-hive", "--inventory", str(folder)) as queen:

            def ready() -> bool:
                return [w.state for hive in queen.status().hives for w in hive.workers] == ["ready"] * len(urls)

            until(ready, "the servers")
            yield queen


def servers(stack: contextlib.ExitStack) -> tuple[RunningQueen, dict[str, Target]]:
    """Start three servers that are only addresses, and a queen; return her, and them by their workers' ids."""
    some = [stack.enter_context(running_server(word_s=0.05)) for _ in range(3)]
    queen = stack.enter_context(queen_of(64, *(server.url for server in some)))
    return queen, {f"desk/s{number}": server for number, server in enumerate(some)}


def hosts(stack: contextlib.ExitStack) -> tuple[RunningQueen, dict[str, Target]]:
    """Start three hives with a worker each, and a queen; return her, and the hives by their workers' ids."""
    fleet = FleetFolder(Path(stack.enter_context(tempfile.TemporaryDirectory()), "inventory"))
    hives = {f"host{number}": stack.enter_context(fleet.hive(f"host{number}")) for number in range(3)}
    fleet.write(**{name: hive.port for name, hive in hives.items()})
    queen = stack.enter_context(running_queen("--no-hive", "--inventory", str(fleet.folder)))
    for name in hives:
        until_state(queen, name, "ready")
    return queen, {f"{name}/{WORKER}": hive for name, hive in hives.items()}


def one_fault(kind: Kind, fault: Break) -> Felt:
    """Ask all the time, break the one of three that has answered most, and see which requests feel it."""
    with contextlib.ExitStack() as stack:
        queen, targets = kind(stack)
        asked: Asked = []
        clients = Group()
        address = urlsplit(queen.url).netloc
        for _ in range(50):
            clients.spawn(ask, address, asked)
            gevent.sleep(EVERY_S)
        most_used = statistics.mode(worker for _, _, worker in asked if worker)
        broken_at = time.monotonic()
        with fault(targets[most_used]):
            while time.monotonic() < broken_at + WATCHED_S:
                clients.spawn(ask, address, asked)
                gevent.sleep(EVERY_S)
            clients.join(timeout=60)
        felt = [one for one in asked if one[1] - one[0] > HELD_UP_S or not one[2]]
        # A request that was under way when the fault came has felt it as well.
        until_s = max((max(0.0, began - broken_at) for began, _, _ in felt), default=0.0)
        longest = max(ended - max(began, broken_at) for began, ended, _ in asked if ended > broken_at)
        return Felt(until_s, longest, sum(not worker for _, _, worker in asked))


def ask(address: str, asked: Asked) -> None:
    """Send one request on a connection of its own, and note what became of it."""
    began, worker = time.monotonic(), ""
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection(address, timeout=60)
        with contextlib.closing(connection):
            connection.request("POST", CHAT, BODY)
            answer = connection.getresponse()
            if b"one two three" in answer.read() and answer.status == 200:
                worker = answer.getheader("X-Rbee-Worker", "")
    asked.append((began, time.monotonic(), worker))


@contextlib.contextmanager
def killed(target: Target) -> Iterator[None]:
    """End it as `kill -9` does."""
    target.process.kill()
    yield


@contextlib.contextmanager
def stopped(target: Target) -> Iterator[None]:
    """Let it stand; its kernel takes connections on."""
    os.kill(target.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(target.process.pid, signal.SIGCONT)


@contextlib.contextmanager
def cut_off(target: Target) -> Iterator[None]:
    """Let every packet to and from a port vanish, on this machine's loopback."""
    name = f"inet rbee_bench_{os.getpid()}"
    chain = "type filter hook input priority 0;"
    rules = f"tcp dport {target.port} drop; tcp sport {target.port} drop;"
    nft(f"table {name} {{\nchain fault {{\n{chain}\n{rules}\n}}\n}}\n")
    try:
        yield
    finally:
        nft(f"delete table {name}\n")


def nft(text: str) -> None:
    """Give rules to the kernel."""
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)


def overload(rounds: int) -> str:
    """Measure what is done at the capacity and at ten times of it, in turns, and how fast the rest is refused."""
    alone, crowded, refusals = [], [], []
    with running_server(word_s=JOB_S) as server, queen_of(SLOTS, server.url) as queen:
        address = urlsplit(queen.url).netloc
        for _ in range(rounds):
            alone.append(goodput(server, address, SLOTS, 0.0, []))
            refused: list[float] = []
            pause_s = 40 / (OVERLOAD * SLOTS / JOB_S)
            crowded.append(goodput(server, address, 256 + SLOTS + 40, pause_s, refused))
            refusals.append(refused)
            until(lambda: server.told().in_flight == 0, "the jobs to end")
    share = ratio(crowded, alone)
    ms = [[1000 * value for value in some] for some in refusals]
    rows = [
        ["jobs/s at the capacity", spread(alone).text(1)],
        [f"jobs/s at {OVERLOAD} times of it", spread(crowded).text(1)],
        ["share of the goodput that is kept", share.text(2) if share else "-"],
        ["refusals, median ms", spread(statistics.median(some) for some in ms).text(1)],
        ["refusals, 99th percentile ms", spread(statistics.quantiles(some, n=100)[98] for some in ms).text(1)],
    ]
    return table(("overload", "least / median / greatest"), rows)


def goodput(server: RunningServer, address: str, clients: int, pause_s: float, refused: list[float]) -> float:
    """Return how many jobs a second are answered while so many clients ask without end."""
    crowd = Group()
    for _ in range(clients):
        crowd.spawn(ask_on, address, pause_s, refused)
    gevent.sleep(3 * JOB_S)
    before, began = server.told().answered, time.monotonic()
    refused.clear()
    gevent.sleep(WINDOW_S)
    done = (server.told().answered - before) / (time.monotonic() - began)
    crowd.kill()
    return done


def ask_on(address: str, pause_s: float, refused: list[float]) -> None:
    """Ask without end; after a refusal, wait a little."""
    with contextlib.closing(http.client.HTTPConnection(address, timeout=120)) as connection:
        while True:
            began = time.monotonic()
            connection.request("POST", CHAT, BODY)
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                refused.append(time.monotonic() - began)
                gevent.sleep(pause_s)


if __name__ == "__main__":
    main()
