"""A queen on her host has what lies beside the inventory: keys of servers, an issuer of tokens, the routing script."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from fleets import Fleet, process_id
from jwt.algorithms import OKPAlgorithm
from machines import Machine, Rig
from machines.commands import wait_until

KEY = ed25519.Ed25519PrivateKey.generate()
RBEE = "/opt/rbee/current"
# As a file: the package around it needs pytest.
SERVER = f"systemd-run --unit=server {RBEE}/bin/rbee-python {RBEE}/site/rbee/testing/openai_server.py --port 9000 --key"
LINE = "Worker cloud url=http://127.0.0.1:9000/v1 model=honey key-file=keys/cloud.key"
SCRIPT = """\
fn should_admit(task, queue_depth) {
    if task.tags.contains("unwanted") { reject("not today") } else { admit() }
}
fn route_task(task, workers) { workers.first() }
"""
ISSUER = "issuer: https://id.example/\naudience: rbee\njwks: ours.json\n"


@pytest.fixture(scope="module")
def fleet(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Return one machine with a queen, and beside its inventory everything that she needs."""
    folder = tmp_path_factory.mktemp("fleet")
    with rig.machines(1) as machines:
        made = Fleet(folder / "inventory", folder / "home", machines)
        made.write(**{machines[0].name: ["QueenPort 7833", LINE]})
        (made.folder / "keys").mkdir()
        (made.folder / "keys" / "cloud.key").write_text("sk-first\n")
        (made.folder / "jwt.yaml").write_text(ISSUER)
        card = {**OKPAlgorithm.to_jwk(KEY.public_key(), as_dict=True), "kid": "ours", "use": "sig", "alg": "EdDSA"}
        (made.folder / "ours.json").write_text(json.dumps({"keys": [card]}))
        (made.folder / "scheduler.rhai").write_text(SCRIPT)
        first = made.apply()
        assert "sk-first" not in first.stdout + first.stderr
        machines[0].console(f"{SERVER} sk-first")
        yield made


def ask(queen: Machine, *headers: str) -> tuple[int, dict[str, Any]]:
    """Send the queen one chat from her own host; with headers, to the address at which everybody needs a key."""
    where = queen.address if headers else "127.0.0.1"
    body = json.dumps({"model": "honey", "messages": [{"role": "user", "content": "hello there"}]})
    words = " ".join(f"-H '{header}'" for header in headers)
    command = f"curl -sS -m 60 -w '\\n%{{http_code}}' {words} http://{where}:7833/v1/chat/completions -d '{body}'"
    text, _, status = queen.console(command).stdout.rpartition("\n")
    return int(status), json.loads(text)


def mode_of(queen: Machine, path: str) -> str:
    return queen.console(f"stat -c '%a %U' {path}").stdout.strip()


def token(key: ed25519.Ed25519PrivateKey) -> str:
    claims = {"iss": "https://id.example/", "aud": "rbee", "sub": "someone", "exp": time.time() + 600}
    return jwt.encode(claims, key, algorithm="EdDSA", headers={"kid": "ours"})


def test_a_server_is_asked_with_its_key_which_nobody_else_can_read(fleet: Fleet) -> None:
    [queen] = fleet.machines
    wait_until(lambda: ask(queen)[0] == 200, "the server to answer")
    path = f"/etc/rbee/server-keys/{queen.name}.cloud"
    assert mode_of(queen, path) == "400 rbee"
    assert mode_of(queen, "/etc/rbee/server-keys") == "700 rbee"
    assert queen.console(f"runuser -u nobody -- cat {path}", check=False).returncode != 0
    assert fleet.plan().returncode == 0, "nothing is left to do"


def test_a_new_key_is_in_force_without_a_restart_and_no_plan_shows_it(fleet: Fleet) -> None:
    [queen] = fleet.machines
    before = process_id(queen, "rbee-queen.service")
    (fleet.folder / "keys" / "cloud.key").write_text("sk-second\n")
    queen.console("systemctl stop server; systemctl reset-failed server", check=False)
    queen.console(f"{SERVER} sk-second")
    plan = fleet.plan()
    assert plan.returncode == 2
    assert "@@ a secret @@" in plan.stdout
    assert "sk-" not in plan.stdout + plan.stderr
    done = fleet.apply()
    assert "sk-" not in done.stdout + done.stderr
    wait_until(lambda: ask(queen)[0] == 200, "the new key to be taken")
    assert process_id(queen, "rbee-queen.service") == before


def test_tokens_of_the_issuer_and_the_routing_script_are_in_force(fleet: Fleet) -> None:
    [queen] = fleet.machines
    wait_until(lambda: ask(queen)[0] == 200, "the server to answer")
    assert ask(queen, f"Authorization: Bearer {token(KEY)}")[0] == 200
    assert ask(queen, f"Authorization: Bearer {token(ed25519.Ed25519PrivateKey.generate())}")[0] == 401
    status, refused = ask(queen, f"Authorization: Bearer {token(KEY)}", "X-Rbee-Tags: unwanted")
    assert status == 429
    assert "not today" in refused["error"]["message"]


def test_the_queen_keeps_what_she_has_to(fleet: Fleet) -> None:
    """Her unit lets her write records, limits and decisions, and nothing elsewhere."""
    [queen] = fleet.machines
    wait_until(lambda: ask(queen)[0] == 200, "the server to answer")
    state = "/var/lib/rbee/queen/state"
    wait_until(lambda: queen.console(f"test -s {state}/decisions.jsonl", check=False).returncode == 0, "decisions")
    assert queen.console(f"test -s {state}/records/records.sqlite", check=False).returncode == 0
    made = queen.console("runuser -u rbee -- env RBEE_HOME=/var/lib/rbee/queen /opt/rbee/current/bin/rbee key create x")
    key = made.stdout.strip()
    queen.console(
        "runuser -u rbee -- env RBEE_HOME=/var/lib/rbee/queen /opt/rbee/current/bin/rbee key set"
        f" {key.removeprefix('rbee_sk_')[:8]} --tokens-per-day 100000"
    )
    assert ask(queen, f"Authorization: Bearer {key}")[0] == 200
    wait_until(lambda: queen.console(f"test -s {state}/limits.json", check=False).returncode == 0, "limits")
    job = json.dumps({"endpoint": "/v1/chat/completions", "body": {"model": "honey", "messages": [
        {"role": "user", "content": "x"}]}})  # fmt: skip
    made = queen.console(f"curl -sS -m 60 http://127.0.0.1:7833/v1/jobs -d '{job}'")
    assert json.loads(made.stdout)["status"] == "queued"
    assert "rror" not in queen.journal("rbee-queen").replace("error_log", "")


def test_her_own_settings_reach_her_with_the_package_and_the_password_that_they_need(fleet: Fleet) -> None:
    [queen] = fleet.machines
    (fleet.folder / "keys" / "redis").write_text("redis-secret\n")
    (fleet.folder / "queen.yaml").write_text(
        "log_format: json\nstate: redis://127.0.0.1:6379/0\nstate_password_file: keys/redis\n"
    )
    done = fleet.apply()
    assert "redis-secret" not in done.stdout + done.stderr
    assert mode_of(queen, "/etc/rbee/server-keys/state-password") == "400 rbee"
    # No Redis is there: she says so, and serves on her own.
    wait_until(lambda: ask(queen)[0] == 200, "the server to answer")
    last = queen.console("journalctl -u rbee-queen -o cat | grep '^{' | tail -1").stdout
    assert json.loads(last)
    (fleet.folder / "queen.yaml").unlink()
    fleet.apply()
    assert mode_of(queen, "/etc/rbee/queen.yaml") == "644 root"
    assert "redis" not in queen.console("cat /etc/rbee/queen.yaml").stdout


def test_what_leaves_the_inventory_leaves_the_host(fleet: Fleet) -> None:
    [queen] = fleet.machines
    fleet.write(**{queen.name: ["QueenPort 7833"]})
    for name in ("jwt.yaml", "ours.json", "scheduler.rhai"):
        (fleet.folder / name).unlink()
    done = fleet.apply()
    assert "sk-" not in done.stdout + done.stderr
    left = queen.console("find /etc/rbee/server-keys /etc/rbee/inventory -type f").stdout.split()
    assert [Path(path).name for path in left] == ["fleet.conf"]
    assert ask(queen, f"Authorization: Bearer {token(KEY)}")[0] == 401
