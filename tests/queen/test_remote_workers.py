"""Any OpenAI-compatible server is a worker: the inventory's `Worker NAME url=…` lines."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from queen_rig import FleetFolder, free_port, until_state, view

from rbee.errors import RbeeError
from rbee.testing.openai_server import running_server
from rbee.testing.programs import RunningQueen, running_queen, until
from rbee.wire.fleet import WorkerReport, WorkerState

CHAT = "/v1/chat/completions"


@pytest.fixture
def queen(fleet: FleetFolder) -> Iterator[RunningQueen]:
    """Return a queen with an inventory that has no host yet."""
    fleet.write()
    with running_queen("--no-hive", "--inventory", str(fleet.folder)) as running:
        yield running


def chat(model: str = "honey", text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


def answered(queen: RunningQueen, **fields: Any) -> str:
    answer = queen.client.post(CHAT, chat(**fields), dict[str, Any])
    return str(answer["choices"][0]["message"]["content"])


def worker(queen: RunningQueen, host: str, name: str) -> WorkerReport | None:
    shown = view(queen, host)
    return next((one for one in shown.workers if one.name == name), None) if shown else None


def until_worker(queen: RunningQueen, host: str, name: str, state: WorkerState) -> WorkerReport:
    until(lambda: (found := worker(queen, host, name)) and found.state is state, f"{host}/{name} to be {state}")
    found = worker(queen, host, name)
    assert found is not None
    return found


def models(queen: RunningQueen) -> dict[str, Any]:
    return {card["id"]: card["rbee"] for card in queen.client.get("/v1/models", dict[str, Any])["data"]}


def metrics(queen: RunningQueen) -> list[str]:
    return queen.client.send("GET", "/metrics").read().decode().splitlines()


def test_a_server_answers_streams_and_is_listed(queen: RunningQueen, fleet: FleetFolder) -> None:
    with running_server() as server:
        fleet.write(desk=["HivePort none", "Region eu", f"Worker says model=honey url={server.url}"])
        found = until_worker(queen, "desk", "says", WorkerState.READY)
        assert (found.slots, found.capabilities) == (8, ["chat", "completion", "embedding"])
        assert answered(queen) == "one two three"
        connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
        connection.request("POST", CHAT, json.dumps(chat(stream=True)))
        answer = connection.getresponse()
        assert answer.getheader("X-Rbee-Worker") == "desk/says"
        body = answer.read()
        assert body.count(b'"content"') == 3
        assert body.endswith(b"data: [DONE]\n\n")
        connection.close()
        embedded = queen.client.post("/v1/embeddings", {"model": "honey", "input": "x"}, dict[str, Any])
        assert embedded["data"][0]["embedding"] == [0.0, 1.0]
        assert models(queen)["honey"]["loaded"] == ["desk/says"]
        assert models(queen)["honey"]["hives"] == ["desk"]
        lines = metrics(queen)
        assert 'rbee_worker_state{hive="desk",model="honey",state="ready",worker="says"} 1.0' in lines
        assert 'rbee_tokens_total{direction="out",model="honey"} 6.0' in lines
        shown = view(queen, "desk")
        assert shown is not None
        assert (shown.state, shown.region) == ("ready", "eu")


def test_it_is_dialled_at_its_base_path_with_its_key_and_its_own_name_of_the_model(
    queen: RunningQueen, fleet: FleetFolder, tmp_path: Path
) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("wrong\n")
    with running_server("big/honey", base="/openai/v2", key="sesame") as server:
        line = f"Worker says model=honey url={server.url} key-file={key_file} upstream-model=big/honey"
        fleet.write(desk=["HivePort none", line])
        found = until_worker(queen, "desk", "says", WorkerState.FAILED)
        assert "refuses the API key" in found.reason
        with pytest.raises(RbeeError, match="No server that has the model 'honey' answers") as refused:
            answered(queen)
        assert refused.value.status == 503
        # The file is read anew, without a word to the queen.
        key_file.write_text("sesame\n")
        until_worker(queen, "desk", "says", WorkerState.READY)
        assert answered(queen, temperature=0.5, text='a "quoted" text') == 'a "quoted" text'
        told = server.told()
        assert (told.path, told.model, told.token) == ("/openai/v2/chat/completions", "big/honey", "sesame")
        assert told.body == chat("big/honey", 'a "quoted" text', temperature=0.5)


def test_a_missing_key_file_is_told_of(queen: RunningQueen, fleet: FleetFolder, tmp_path: Path) -> None:
    with running_server(key="sesame") as server:
        line = f"Worker says model=honey url={server.url} key-file={tmp_path / 'none'}"
        fleet.write(desk=["HivePort none", line])
        found = until_worker(queen, "desk", "says", WorkerState.FAILED)
        assert found.reason == f"The key file {tmp_path / 'none'} cannot be read (No such file or directory)"
        assert any(problem.where == "desk/says" for problem in queen.status().problems)
        assert server.told().jobs == 0


def test_a_server_that_goes_leaves_routing_at_once_and_comes_back(queen: RunningQueen, fleet: FleetFolder) -> None:
    port = free_port()
    with running_server() as stays:
        lines = ["HivePort none", f"Worker goes model=honey url=http://127.0.0.1:{port}"]
        fleet.write(desk=[*lines, f"Worker stays model=honey url={stays.url}"])
        with running_server(port=port):
            until_worker(queen, "desk", "goes", WorkerState.READY)
            until_worker(queen, "desk", "stays", WorkerState.READY)
            assert [answered(queen) for _ in range(4)] == ["one two three"] * 4
        # Nobody told the queen: the first job that cannot be sent there finds out, and goes elsewhere unharmed.
        for _ in range(10):
            assert answered(queen) == "one two three"
        gone = until_worker(queen, "desk", "goes", WorkerState.FAILED)
        assert f"127.0.0.1:{port}" in gone.reason
        assert models(queen)["honey"]["loaded"] == ["desk/stays"]
        with running_server(port=port) as back:
            until_worker(queen, "desk", "goes", WorkerState.READY)
            until(lambda: answered(queen) and back.told().jobs, "the server to be sent jobs again")


def test_the_last_server_that_does_not_answer_is_a_503_with_the_reason(queen: RunningQueen, fleet: FleetFolder) -> None:
    fleet.write(desk=["HivePort none", f"Worker says model=honey url=http://127.0.0.1:{free_port()}"])
    until_state(queen, "desk", "unreachable")
    with pytest.raises(RbeeError, match="desk/says: Nothing answers at ") as refused:
        answered(queen)
    assert refused.value.status == 503
    assert models(queen) == {}


def test_a_line_that_goes_or_changes_is_followed(queen: RunningQueen, fleet: FleetFolder) -> None:
    with running_server() as server, running_server("nectar") as other:
        fleet.write(desk=["HivePort none", f"Worker says model=honey url={server.url}"])
        until_worker(queen, "desk", "says", WorkerState.READY)
        since = until_worker(queen, "desk", "says", WorkerState.READY).started_at
        fleet.write(
            desk=[
                "HivePort none",
                f"Worker more model=nectar url={other.url} slots=3 capabilities=chat",
                f"Worker says model=honey url={server.url}",
            ]
        )
        found = until_worker(queen, "desk", "more", WorkerState.READY)
        assert (found.slots, found.capabilities) == (3, ["chat"])
        kept = worker(queen, "desk", "says")
        assert kept is not None
        assert kept.started_at == since
        with pytest.raises(RbeeError, match="can do embedding"):
            queen.client.post("/v1/embeddings", {"model": "nectar", "input": "x"}, dict[str, Any])
        fleet.write()
        until(lambda: view(queen, "desk") is None, "the servers to go")
        with pytest.raises(RbeeError, match="not installed"):
            answered(queen)


def test_a_model_that_a_server_does_not_list_is_a_warning(queen: RunningQueen, fleet: FleetFolder) -> None:
    with running_server("nectar") as server:
        fleet.write(desk=["HivePort none", f"Worker says model=honey url={server.url}"])
        found = until_worker(queen, "desk", "says", WorkerState.READY)
        assert "does not list the model 'honey', but nectar. Try: upstream-model=" in found.reason
        assert answered(queen) == "one two three"


def test_a_host_has_a_hive_and_servers(queen: RunningQueen, fleet: FleetFolder) -> None:
    with running_server("nectar") as server, fleet.hive("box") as hive:
        fleet.write(box=["HostName 127.0.0.1", f"HivePort {hive.port}", f"Worker far model=nectar url={server.url}"])
        until_worker(queen, "box", "far", WorkerState.READY)
        until_worker(queen, "box", "says", WorkerState.READY)
        assert answered(queen, model="nectar") == answered(queen, model="honey") == "one two three"
        wish = {"X-Rbee-Hive": "box", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
        connection.request("POST", CHAT, json.dumps(chat("nectar")), wish)
        assert connection.getresponse().read().count(b"one two three") == 1
        connection.close()
        shown = view(queen, "box")
        assert shown is not None
        assert (shown.state, [one.name for one in shown.workers]) == ("ready", ["says", "far"])
