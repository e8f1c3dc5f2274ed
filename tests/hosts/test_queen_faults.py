"""Faults of the network between the queen and a host with workers, and a restart of her unit, on real machines."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fleets import DEMO, Fleet, process_id
from machines import Machine, Rig
from machines.commands import wait_until
from machines.network import rules

QUEEN_PORT = 7833
CHAT = "/v1/chat/completions"
WORKER_PORT = 8001
LOSS_PERCENT = 30
FLAPS = 8
RATE = 50
CLIENTS = 5


@pytest.fixture(scope="module")
def fleet(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Return two machines with a worker each, of which the first has the queen too."""
    folder = tmp_path_factory.mktemp("fleet")
    with rig.machines(2) as machines:
        made = Fleet(folder / "inventory", folder / "home", machines)
        first, second = (machine.name for machine in machines)
        made.write(**{first: [f"QueenPort {QUEEN_PORT}", DEMO], second: [DEMO]}).apply()
        yield made


@pytest.fixture
def hosts(fleet: Fleet) -> Iterator[tuple[Machine, Machine]]:
    """Return both machines, whole again and known to the queen before and after each test."""
    queen, other = fleet.machines
    for machine in (queen, other):
        machine.heal()
    wait_until(lambda: in_routing(queen, queen, other), "both workers to be ready")
    yield queen, other
    for machine in (queen, other):
        machine.heal()
    wait_until(lambda: in_routing(queen, queen, other), "both workers to be ready again")


def call(queen: Machine, command: str) -> Any:
    """Ask the queen on her own machine, past the network, and return the JSON of her answer."""
    done = queen.console(f"curl -sS -m 60 {command}", check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def url(path: str) -> str:
    return f"http://127.0.0.1:{QUEEN_PORT}{path}"


def in_routing(queen: Machine, *hosts: Machine) -> bool:
    """Return True when jobs are sent to the workers of all these hosts at present."""
    loaded = {name for card in call(queen, url("/v1/models"))["data"] for name in card["rbee"]["loaded"]}
    return {f"{host.name}/demo" for host in hosts} <= loaded


def body(**fields: Any) -> str:
    return json.dumps({"model": "rbee-demo", "messages": [{"role": "user", "content": "What is a hive?"}], **fields})


def answered(queen: Machine, hive: str = "", **fields: Any) -> str:
    """Ask, and return the worker that answered, or the code of the error."""
    wish = f"-H 'X-Rbee-Hive: {hive}'" if hive else ""
    said = queen.console(f"curl -sS -m 60 -D - {wish} {url(CHAT)} -d '{body(max_tokens=4, **fields)}'").stdout
    for line in said.splitlines():
        if line.lower().startswith("x-rbee-worker: ") and " 200 " in said.splitlines()[0]:
            return line.partition(": ")[2].strip()
    return str(json.loads(said.splitlines()[-1])["error"]["code"])


def changes(queen: Machine, other: Machine) -> list[str]:
    """Return what the queen's log says of coming and going of a hive."""
    lines = queen.journal("rbee-queen.service").splitlines()
    return [line for line in lines if f"the hive {other.name} is " in line]


def state(queen: Machine, other: Machine) -> str:
    """Return how the queen stands with a hive."""
    program = "import json; print(json.load(open('/var/lib/rbee/queen/state/queen.json'))['token'])"
    token = queen.console(f'python3 -c "{program}"').stdout.strip()
    hives = call(queen, f"-H 'Authorization: Bearer {token}' {url('/v1/orchestrator/status')}")["hives"]
    return str(next(hive["state"] for hive in hives if hive["hive"] == other.name))


def test_a_host_that_is_cut_off_is_routed_around_and_comes_back(fleet: Fleet, hosts: tuple[Machine, Machine]) -> None:
    queen, other = hosts
    kept = process_id(other, "rbee-worker@demo.service")
    assert answered(queen, other.name).startswith(f"{other.name}/")
    other.blackhole("both", peer=queen.address)
    # Whoever comes at once is answered, too: by the machine that is left.
    assert {answered(queen) for _ in range(6)} == {f"{queen.name}/demo"}
    wait_until(lambda: state(queen, other) == "unreachable", "the hive to be known as out of reach")
    wait_until(lambda: not in_routing(queen, other), "its worker to leave routing")
    assert answered(queen, other.name) in ("busy", "not_found")
    other.heal()
    wait_until(lambda: state(queen, other) == "ready", "the hive to be back")
    assert answered(queen, other.name).startswith(f"{other.name}/")
    assert process_id(other, "rbee-worker@demo.service") == kept


def test_a_worker_that_no_job_reaches_is_left_out_though_its_hive_reports(hosts: tuple[Machine, Machine]) -> None:
    queen, other = hosts
    assert answered(queen, other.name).startswith(f"{other.name}/")
    # What goes to the worker's port is lost; the hive's port, and all that comes from there, is not.
    drop = f'oifname "{other.namespace}" ip saddr {queen.address} tcp dport {WORKER_PORT} drop\n'
    rules(other.network.switch, f"bridge {other.namespace}", f"type filter hook forward priority 0;\n{drop}")
    # A job that must go there finds it out.
    assert answered(queen, other.name) != f"{other.name}/demo"
    assert f"{other.name}/demo" not in {answered(queen) for _ in range(6)}
    wait_until(lambda: not in_routing(queen, other), "the worker to leave routing")
    assert state(queen, other) == "ready"
    other.heal()
    wait_until(lambda: in_routing(queen, other), "the worker to be back")
    assert answered(queen, other.name).startswith(f"{other.name}/")


def test_a_link_that_flaps_does_not_make_the_fleet_flap(hosts: tuple[Machine, Machine]) -> None:
    queen, other = hosts
    kept = process_id(other, "rbee-worker@demo.service")
    before = len(changes(queen, other))
    for _ in range(FLAPS):
        other.blackhole("both", peer=queen.address)
        time.sleep(2)  # the fault itself
        other.heal()
        time.sleep(2)
        assert answered(queen).endswith("/demo")
    assert len(changes(queen, other)) - before <= 2
    wait_until(lambda: state(queen, other) == "ready" and in_routing(queen, queen, other), "everything to be quiet")
    assert process_id(other, "rbee-worker@demo.service") == kept
    assert answered(queen, other.name).startswith(f"{other.name}/")


def test_a_link_that_loses_much_is_slow_and_not_down(hosts: tuple[Machine, Machine]) -> None:
    queen, other = hosts
    other.blackhole("both", peer=queen.address, percent=LOSS_PERCENT)
    until = time.monotonic() + 20
    answers: list[str] = []
    while time.monotonic() < until or len(answers) < 5:
        answers.append(answered(queen))
        assert state(queen, other) == "ready"
    assert all(answer.endswith("/demo") for answer in answers), answers
    stream = queen.console(f"curl -sSN -m 100 {url(CHAT)} -d '{body(stream=True, max_tokens=40)}'").stdout
    assert stream.rstrip().endswith("data: [DONE]")
    assert state(queen, other) == "ready"


LOAD = f"""
import http.client, json, os, threading
answered, failed = [], []
def ask():
    connection = http.client.HTTPConnection("127.0.0.1", {QUEEN_PORT}, timeout=120)
    while not os.path.exists("/run/load-ends"):
        threading.Event().wait({CLIENTS / RATE})
        try:
            connection.request("POST", "{CHAT}", BODY)
            answer = connection.getresponse()
            told = answer.read()
        except (OSError, http.client.HTTPException) as problem:
            failed.append(repr(problem))
            connection.close()
            continue
        (answered if answer.status == 200 else failed).append(told.decode()[:300])
        open("/run/load-answered", "w").write(str(len(answered)))
threads = [threading.Thread(target=ask) for _ in range({CLIENTS})]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(dict(answered=len(answered), failed=failed)))
"""


class Load:
    """Clients on the queen's machine that keep asking, each on a connection that it keeps while she does."""

    def __init__(self, queen: Machine) -> None:
        self.told: dict[str, Any] = {}
        self._queen = queen
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._queen.console("rm -f /run/load-ends /run/load-answered")
        self._thread.start()
        return self

    def __exit__(self, *told: object) -> None:
        self._queen.console("touch /run/load-ends")
        self._thread.join(180)

    def some_more(self) -> None:
        """Wait until a second's worth of requests was answered."""
        before = self._answered()
        wait_until(lambda: self._answered() >= before + RATE, "requests to be answered")

    def _answered(self) -> int:
        return int(self._queen.console("cat /run/load-answered 2>/dev/null || true").stdout or 0)

    def _run(self) -> None:
        script = LOAD.replace("BODY", repr(body(max_tokens=1)))
        self.told = json.loads(self._queen.console("python3 -", stdin=script).stdout)


def restarted(queen: Machine, before: str) -> bool:
    # The rig looks for the machine's processes while some of them end.
    with contextlib.suppress(OSError):
        return process_id(queen, "rbee-queen.service") not in ("0", before)
    return False


def test_a_restart_of_her_unit_under_load_fails_no_request(hosts: tuple[Machine, Machine]) -> None:
    queen, _ = hosts
    with Load(queen) as load:
        load.some_more()
        for how in ("systemctl restart", "systemctl kill --kill-whom=main --signal=TERM"):
            before = process_id(queen, "rbee-queen.service")
            queen.console(f"{how} rbee-queen.service")
            wait_until(lambda before=before: restarted(queen, before), "her to be back")  # type: ignore[misc]
            load.some_more()
    assert load.told["failed"] == []
    assert load.told["answered"] > 3 * RATE
    assert queen.failed_units() == []


def test_an_apply_that_restarts_her_under_load_fails_no_request(fleet: Fleet, hosts: tuple[Machine, Machine]) -> None:
    queen, _ = hosts
    before = process_id(queen, "rbee-queen.service")
    queen.console("echo '# somebody was here' >> /etc/systemd/system/rbee-queen.service")
    with Load(queen) as load:
        load.some_more()
        fleet.apply()
        load.some_more()
    assert restarted(queen, before)
    assert load.told["failed"] == []


def test_a_queen_that_listens_elsewhere_does_not_take_the_kept_socket(
    fleet: Fleet, hosts: tuple[Machine, Machine]
) -> None:
    queen, _ = hosts
    settings = "/etc/rbee/queen.yaml"
    before = queen.console(f"cat {settings}").stdout
    try:
        elsewhere = f"port: {QUEEN_PORT + 10}\n"
        queen.console(f"cat > {settings} && systemctl restart rbee-queen.service", stdin=elsewhere)
        assert call(queen, f"http://127.0.0.1:{QUEEN_PORT + 10}/health")["status"] == "ok"
        assert queen.console(f"curl -s -m 5 {url('/health')}", check=False).returncode == 7
    finally:
        queen.console(f"cat > {settings} && systemctl restart rbee-queen.service", stdin=before)
    assert call(queen, url("/health"))["status"] == "ok"
