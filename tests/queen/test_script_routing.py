"""What a routing script is shown, and what policy makes of its answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rbee.errors import Busy, NotSupported
from rbee.inventory import read as read_inventory
from rbee.inventory.fleet import At, Host
from rbee.inventory.fleet import Fleet as Inventory
from rbee.inventory.world import this_machine
from rbee.inventory.write import inventory_text
from rbee.queen.access import Caller
from rbee.queen.client_watch import ClientWatch
from rbee.queen.decisions import DecisionLog
from rbee.queen.fleet import Fleet
from rbee.queen.hardware import gpu_type, hardware
from rbee.queen.hives import Worker
from rbee.queen.job import Job
from rbee.queen.policy import Policy
from rbee.queen.prefixes import BLOCK_BYTES, PrefixIndex, prefix_hashes
from rbee.queen.routing import Routing, query_of
from rbee.queen.script import RoutingScript
from rbee.queen.watched import Watched
from rbee.wire.fleet import Device, EngineReport, HiveReport, ModelReport, WorkerAccess, WorkerReport, WorkerState
from rbee.wire.openai import ChatRequest, Message

GIB = 1 << 30


def report(
    hive: str, *, device: Device | None = None, sequence: int = 1, names: tuple[str, ...] = ("w",)
) -> HiveReport:
    workers = [
        WorkerReport(
            name=name, model="honey", backend="engine", state=WorkerState.READY, capabilities=["chat"], slots=2,
            device=device.kind if device else "cpu", access=WorkerAccess(url="http://127.0.0.1:9"),
        )
        for name in names
    ]  # fmt: skip
    return HiveReport(
        hive=hive, url=f"http://{hive}:1", version="0", epoch=1.0, sequence=sequence, workers=workers,
        devices=[device] if device else [], engines=[EngineReport(name="engine", capabilities=["chat"])],
        models=[ModelReport(name="honey", capabilities=["chat"], format="gguf")],
    )  # fmt: skip


def job(text: str = "hello", *, tenant: str = "", tier: str = "", region: str = "", **fields: Any) -> Job:
    request = ChatRequest(model="honey", messages=[Message(role="user", content=text)], **fields)
    caller = Caller("k1", "key", frozenset({"inference"}), Policy(tenant=tenant, tier=tier))
    made = Job("/v1/chat/completions", request, b"", caller, ClientWatch(None))
    made.region = region
    return made


class Rig:
    """A fleet without processes, and a script."""

    def __init__(self, folder: Path) -> None:
        self.fleet = Fleet(folder / "fleet.json", "token")
        self.path = folder / "scheduler.rhai"
        self.script = RoutingScript(self.path)
        self.log = DecisionLog(folder / "decisions.jsonl")
        self.routing = Routing(self.fleet, self.script, choice_timeout_s=0.0, decisions=self.log)

    def write(self, body: str) -> None:
        self.path.write_text(f"fn route_task(task, workers) {{ {body} }}")
        self.script.reload()
        assert self.script.error == ""

    def host(self, told: HiveReport, **lines: Any) -> None:
        self.fleet.learn(told)
        host = Host(name=told.hive, at=At("hives.conf", 1), hostname="127.0.0.1", user="u", **lines)
        self.fleet.hives[told.hive].watched = self.fleet.watched[told.hive] = Watched(host, told.url)
        self.fleet.watched[told.hive].heard()

    def worker(self, hive: str, name: str = "w") -> Worker:
        return self.fleet.hives[hive].workers[name]

    def chosen(self, wanted: Job) -> list[str]:
        return [place.id for place in self.routing.rank(wanted)]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_a_job_that_must_stay_in_a_region_goes_nowhere_else_whatever_the_script_says(rig: Rig) -> None:
    rig.host(report("home"), region="eu")
    rig.host(report("cloud"), region="us")
    rig.write('workers.filter(|w| w.hive == "cloud").first()')
    assert rig.chosen(job()) == ["cloud/w"]
    with pytest.raises(Busy, match="chose no worker"):
        rig.chosen(job(region="EU"))
    rig.write('workers.sort_by("hive")')
    assert rig.chosen(job()) == ["cloud/w", "home/w"]
    assert rig.chosen(job(region="EU")) == ["home/w"]


def test_no_machine_in_the_region_is_said_at_once(rig: Rig) -> None:
    rig.host(report("home"), region="eu")
    rig.fleet._settles_by = 0.0
    with pytest.raises(NotSupported, match="it is in the region eu, and the job must stay in asia"):
        rig.chosen(job(region="asia"))


def test_a_machine_of_a_tenant_takes_only_that_tenants_jobs(rig: Rig) -> None:
    rig.host(report("acmes"), tenant="acme")
    rig.host(report("everyones"))
    rig.write('workers.sort_by("hive")')
    assert rig.chosen(job(tenant="acme")) == ["acmes/w", "everyones/w"]
    assert rig.chosen(job(tenant="other")) == ["everyones/w"]
    assert rig.chosen(job()) == ["everyones/w"]
    view, _ = rig.routing.explain(query_of(job()), job().record())
    assert [place.id for place in view.places] == ["everyones/w"]
    assert rig.routing.refused(query_of(job())) == {"acmes/w": "it is another tenant's"}


def test_a_script_sees_what_the_machine_and_the_inventory_say(rig: Rig) -> None:
    device = Device(kind="cuda", name="NVIDIA GeForce RTX 4090", memory_total_bytes=24 * GIB, memory_free_bytes=GIB)
    rig.host(report("pc", device=device), region="eu", tags=["quiet"], price=0.35)
    conditions = [
        'w.gpu_type == "RTX4090"', "w.gpus == 1", f"w.vram_total == {24 * GIB}", f"w.vram_free == {GIB}",
        'w.backend == "cuda"', "w.price == 0.35", 'w.tags.contains("quiet")', 'w.region == "eu"', "w.slots == 2",
        'w.capability == task.type', 'w.state == "ready"', "w.loaded",
        'task.customer_tier == "gold" && task.tenant == "acme" && task.key == "k1" && task.stream',
        "task.prompt_bytes == 5 && task.max_tokens == 9 && task.max_bytes == 36",
        'task.metadata.team == "red"',
    ]  # fmt: skip
    wanted = job(tenant="acme", tier="gold", stream=True, max_tokens=9, metadata={"team": "red"})
    for condition in conditions:
        rig.write(f"workers.filter(|w| {condition}).first()")
        assert rig.chosen(wanted) == ["pc/w"], condition


def test_the_queens_own_counts_are_seen_at_the_next_decision(rig: Rig) -> None:
    rig.fleet.learn(report("here", names=("a", "b", "c")))
    assert rig.chosen(job()) == ["here/a"]
    rig.worker("here", "a").in_flight = 3
    assert rig.chosen(job()) == ["here/b"]
    rig.worker("here", "b").in_flight = 1
    assert rig.chosen(job()) == ["here/c"]
    rig.worker("here", "c").lost = True
    assert rig.chosen(job()) == ["here/b"]
    rig.write("workers.filter(|w| w.in_flight == 3 && w.queue == 1 && w.load == 1.5).first()")
    assert rig.chosen(job()) == ["here/a"]


def test_a_worker_that_comes_or_goes_is_seen_at_the_next_decision(rig: Rig) -> None:
    rig.write('workers.sort_by("id")')
    rig.fleet.learn(report("here", names=("b", "c")))
    rig.worker("here", "b").in_flight = 2
    assert rig.chosen(job()) == ["here/b", "here/c"]
    rig.fleet.learn(report("here", names=("a", "b"), sequence=2))
    assert rig.chosen(job()) == ["here/a", "here/b"]
    assert rig.chosen(job()) == ["here/a", "here/b"]
    rig.write("workers.filter(|w| w.in_flight == 2).first()")
    assert rig.chosen(job()) == ["here/b"]


def test_the_worker_that_was_sent_a_prompts_start_is_its_best_prefix(rig: Rig) -> None:
    rig.fleet.learn(report("here", names=("a", "b")))
    rig.write("workers.filter(|w| w.prefix_match > 0.6).best_prefix()")
    start = "system prompt " * 200
    first = job(start + "one")
    with pytest.raises(Busy):
        rig.chosen(first)
    first.worker_id = "here/b"
    rig.routing.served(first)
    assert rig.chosen(job(start + "two")) == ["here/b"]
    with pytest.raises(Busy):
        rig.chosen(job("another " * 200))


def test_only_an_unbroken_start_counts_as_cached() -> None:
    a, b, c = ("x" * BLOCK_BYTES, "y" * BLOCK_BYTES, "z" * BLOCK_BYTES)
    index = PrefixIndex()
    index.learn(prefix_hashes([a + b + c]), "w1")
    index.learn(prefix_hashes([a + c]), "w2")
    assert index.match(prefix_hashes([a + b + b])) == {"w1": 2 / 3, "w2": 1 / 3}
    assert index.match(prefix_hashes([b + a])) == {}
    assert prefix_hashes(["short"]) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX3090Ti"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla T4", "T4"),
        ("AMD Radeon RX 7900 XTX", "RX7900XTX"),
        ("AMD Instinct MI300X", "MI300X"),
        ("Apple M2 Ultra", "M2Ultra"),
        ("", ""),
    ],
)
def test_gpu_types_are_short(name: str, expected: str) -> None:
    assert gpu_type(name) == expected


def test_gpu_lines_stand_for_a_machine_that_reports_nothing() -> None:
    found = hardware("cuda", [], ["0 cuda 24G RTX4090", "1 cuda 24G RTX4090", "2 rocm 16G"])
    assert found == ("RTX4090", 2, 48 * GIB, 0)
    assert hardware("cuda", [], ["0 cuda 24G RTX4090", "1 cuda 80G H100"], [1]) == ("H100", 1, 80 * GIB, 0)
    assert hardware("cpu", [Device(kind="cuda")]) == ("", 0, 0, 0)


def test_decisions_are_kept_without_the_prompt(rig: Rig) -> None:
    rig.fleet.learn(report("here", names=("a", "b")))
    rig.chosen(job("a canary in the text"))
    rig.chosen(job())
    rig.log.flush()
    text = rig.log.path.read_text()
    assert "canary" not in text
    places, first, second = map(json.loads, text.splitlines())
    assert [worker["id"] for worker in places["workers"]] == ["here/a", "here/b"]
    assert first["places"] == second["places"] == places["places"]
    assert (first["chosen"], first["by"], first["task"]["model"]) == (["here/a"], "built-in default", "honey")
    assert [line.strip() for line in rig.log.since(first["at"])] == [line.encode() for line in text.splitlines()]
    assert list(rig.log.since(first["at"] + 3600)) == []


def test_decisions_are_bounded_in_number_and_on_disk(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from rbee.queen import decisions

    monkeypatch.setattr(decisions, "MAX_BYTES", 20_000)
    rig.fleet.learn(report("here"))
    for _ in range(decisions.KEPT_FILES + 3):
        for _ in range(decisions.PER_FLUSH + 20):
            rig.chosen(job())
        rig.log.flush()
    assert len(list(rig.log.path.parent.glob("decisions.jsonl*"))) <= decisions.KEPT_FILES
    lines = rig.log.path.with_name("decisions.jsonl.1").read_text().splitlines()
    assert len(lines) == decisions.PER_FLUSH + 1


def test_a_disk_that_is_full_holds_no_job_up(rig: Rig, tmp_path: Path) -> None:
    rig.log.path = tmp_path / "gone" / "decisions.jsonl"
    rig.fleet.learn(report("here"))
    assert rig.chosen(job()) == ["here/w"]
    rig.log.flush()
    rig.log.path.parent.mkdir()
    assert rig.chosen(job()) == ["here/w"]
    rig.log.flush()
    assert "workers" in json.loads(rig.log.path.read_text().splitlines()[0])


def test_price_and_tenant_of_a_machine_reach_the_queen_that_is_set_up_there(tmp_path: Path) -> None:
    host = Host(
        name="box", at=At("a.conf", 1), hostname="10.0.0.1", user="u", price=0.00015, tenant="acme", region="eu"
    )
    fleet = Inventory(folder=tmp_path, files=[], hosts=[host], sha256="")
    (tmp_path / "inventory.conf").write_text(inventory_text(fleet))
    [found] = read_inventory(tmp_path, this_machine(run_commands=False)).hosts
    assert (found.price, found.tenant, found.region) == (0.00015, "acme", "eu")


def test_a_script_as_printed_sees_that_a_client_said_high(rig: Rig) -> None:
    rig.host(report("gpu", device=Device(kind="cuda", name="NVIDIA H100")))
    rig.host(report("pc"))
    rig.path.write_text((Path(__file__).parent.parent / "data" / "scripts" / "complete-story-2.rhai").read_text())
    rig.script.reload()
    for said, priority, place in (
        ("high", "interactive", "gpu/w"),
        ("low", "batch", "pc/w"),
        ("normal", "normal", "pc/w"),
    ):
        wanted = job(priority=said)
        wanted.priority, wanted.said = wanted.caller.policy.heard(said)
        assert (wanted.priority, wanted.record()["priority"]) == (priority, said)
        assert rig.chosen(wanted) == [place]
