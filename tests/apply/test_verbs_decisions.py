"""What the verbs around an apply decide: which state a rollback means, and how a machine fares."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from rbee.apply.journal import units_of
from rbee.apply.records import Past, add_to_log, past_of, read_log, state_name, state_of, states_at, states_before
from rbee.apply.status import host_status
from rbee.errors import NotFound
from rbee.inventory.fleet import At, Host, WorkerLine

ONE, TWO, THREE = "20260101T000000Z-aaa", "20260102T000000Z-bbb", "20260103T000000Z-aaa"
HERE = At("fleet.conf", 1)


def test_names_of_states_sort_by_time_and_give_their_parts_back() -> None:
    moment = datetime.datetime(2026, 1, 31, 12, 30, 5, tzinfo=datetime.UTC)
    name = state_name("4f2a-91+", moment)
    assert state_name("0", moment + datetime.timedelta(seconds=1)) > name
    state = state_of(name)
    assert (state.revision, datetime.datetime.fromisoformat(state.at)) == ("4f2a-91+", moment)


def test_a_rollback_undoes_the_last_apply_where_it_did_something() -> None:
    pasts = {
        "both": Past(states=[ONE, TWO], last=TWO),
        "first-only": Past(states=[ONE], last=ONE),
        "failed": Past(states=[ONE], last=TWO),
        "new": Past(states=[TWO], last=TWO),
    }
    assert states_before(pasts) == {"both": ONE, "failed": ONE, "new": ""}
    assert states_before({"bare": Past(states=[])}) == {"bare": ""}


def test_a_revision_is_each_host_s_newest_state_of_it_or_the_one_that_it_had_then() -> None:
    pasts = {
        "undone": Past(states=[ONE, TWO, THREE], last=THREE),
        "changed": Past(states=[ONE, TWO], last=TWO),
        "elsewhere": Past(states=["20251231T000000Z-zzz", TWO], last=TWO),
        "later": Past(states=[TWO], last=TWO),
    }
    before = {"undone": THREE, "changed": ONE, "elsewhere": "20251231T000000Z-zzz"}
    assert states_at(pasts, "aaa") == states_at(pasts, "aa") == before
    assert states_at(pasts, ONE) == {**before, "undone": ONE}
    assert states_at(pasts, "20260102") == dict.fromkeys(pasts, TWO)


@pytest.mark.parametrize("to", ["nope", "2026"])
def test_a_state_that_is_unknown_or_ambiguous_is_answered_with_what_there_is(to: str) -> None:
    with pytest.raises(NotFound) as caught:
        states_at({"h": Past(states=[ONE, TWO], last=TWO)}, to)
    assert ONE in caught.value.message
    assert TWO in caught.value.message


def test_the_last_apply_is_the_one_that_the_host_s_log_names() -> None:
    assert past_of({"states": [TWO, ONE], "audit": [{"state": THREE, "error": "no"}]}) == Past(
        states=[ONE, TWO], last=THREE
    )
    assert past_of({"states": [ONE, TWO], "audit": []}).last == TWO
    assert past_of({"states": [], "audit": []}).last == ""


def test_a_damaged_line_of_the_log_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBEE_HOME", str(tmp_path))
    assert read_log(5) == []
    add_to_log({"n": 1})
    with (tmp_path / "state/applies.jsonl").open("a") as file:
        file.write('{"n": \n[]\n')
    add_to_log({"n": 2})
    assert [entry["n"] for entry in read_log(5)] == [1, 2]
    assert [entry["n"] for entry in read_log(1)] == [2]


def host(**more: Any) -> Host:
    worker = WorkerLine(name="chat", at=HERE, model="m", port=8001)
    return Host(name="h", at=HERE, hostname="h", user="root", **{"workers": [worker], **more})


def told(**more: Any) -> dict[str, Any]:
    units = {"rbee-hive.service": "active", "rbee-worker@chat.service": "active"} | more.pop("units", {})
    return {
        "units": {name: {"ActiveState": state} for name, state in units.items()},
        "current": "r1",
        "hive": {"version": "1.2", "workers": [{"name": "chat", "state": "ready", "memory_bytes": 7}]},
        "health": {"chat": {"status": "ready", "in_flight": 3}},
        **more,
    }


def test_a_machine_is_ready_when_all_that_is_declared_is() -> None:
    found = host_status(host(), told())
    assert (found.state, found.about, found.version) == ("ready", "", "1.2")
    assert (found.workers[0].jobs, found.workers[0].memory_bytes) == (3, 7)


@pytest.mark.parametrize(
    ("said", "state", "about"),
    [
        ({"units": {"rbee-hive.service": "failed"}}, "failed", "its hive is failed"),
        ({"hive": {}}, "failed", "its hive does not answer"),
        ({"hive": {}, "units": {"rbee-hive.service": "activating"}}, "starting", "its hive starts"),
        ({"health": {"chat": {"status": "loading"}}}, "starting", "starting: chat"),
        ({"health": {"chat": {"status": "failed", "reason": "no"}}}, "failed", "not ready: chat"),
        ({"health": {}, "hive": {"version": "1"}, "units": {"rbee-worker@chat.service": "inactive"}}, "failed",
         "not ready: chat"),
    ],
)  # fmt: skip
def test_what_keeps_a_machine_from_being_ready(said: dict[str, Any], state: str, about: str) -> None:
    found = host_status(host(), told(**said))
    assert (found.state, found.about) == (state, about)


def test_a_machine_without_units_is_absent_and_one_without_its_queen_has_failed() -> None:
    assert host_status(host(), {"units": {}, "current": "", "hive": {}, "health": {}}).state == "absent"
    assert host_status(host(queen_port=7833), told()).about == "its queen is absent"


def test_logs_know_the_names_of_the_host_s_own_services() -> None:
    assert units_of(host(), "chat") == ["rbee-worker@chat.service"]
    assert units_of(host(queen_port=7833), "queen") == ["rbee-queen.service"]
    for name in ("queen", "nobody"):
        with pytest.raises(NotFound, match=r"fleet\.conf") as caught:
            units_of(host(), name)
        assert caught.value.hint == "one of hive, chat"
