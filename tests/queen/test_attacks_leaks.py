"""Attack 24 of docs/security.md: prompts where none should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attack_rig import CHAT, Victim, bearer, beside, chat
from hostile_server import HostileServer, hostile_server
from queen_rig import FleetFolder

from rbee.testing.programs import until

CANARY = "canary-in-a-coal-mine-7f3a"


def provoke(found: Victim, hostile: HostileServer) -> list[bytes]:
    """Ask for everything that can go wrong with a prompt; return the answers that were errors."""
    key, answers = bearer(found.key("k")), []

    def ask(path: str, value: Any, **headers: str) -> None:
        told = found.ask("POST", path, value, **key, **headers)
        if told.status != 200 or b'"error"' in told.body:
            answers.append(told.body)

    prompt = chat(CANARY)
    hostile.uses("3", "3")
    for path, value in (
        (CHAT, prompt),
        ("/v1/completions", {"model": "honey", "prompt": CANARY}),
        ("/v1/embeddings", {"model": "honey", "input": [CANARY, "b"]}),
        ("/v1/responses", {"model": "honey", "input": CANARY}),
        ("/v1/messages", {"model": "honey", "max_tokens": 1, "messages": prompt["messages"]}),
        ("/v1/messages/count_tokens", {"model": "honey", "messages": prompt["messages"]}),
        ("/v1/rerank", {"model": "honey", "query": CANARY, "documents": [CANARY]}),
        ("/v2/tasks", {"prompt": CANARY, "capability": "text-gen", "model": "honey"}),
    ):
        ask(path, value)
        ask(path, {**value, "model": "none"})
        ask(path, json.dumps(value).encode()[:-1])
        ask(path, json.dumps(value).encode().replace(CANARY.encode(), CANARY.encode() + b"\xff"))
        ask(path, {**value, "stream": "yes", "temperature": 9, "max_tokens": -1})
        ask(path, {**value, "model": 7})
    ask(CHAT, {**prompt, "messages": [{"role": "user", "content": {"a": CANARY}}]})
    ask(CHAT, {**prompt, "messages": [{"role": "user", "content": [{"text": CANARY}]}]})
    ask(CHAT, {**prompt, "messages": CANARY})
    ask(CHAT, chat(CANARY * 200_000))
    for header in ("X_Rbee_Priority", "X_Rbee_Hive", "X_Request_Timeout"):
        ask(CHAT, prompt, **{header: "nonsense !"})
    ask(CHAT, prompt, X_Request_Timeout="0.000001")
    for stream in (False, True):
        for status in (400, 404, 413, 429, 500, 503):
            hostile.says({"error": {"message": f"cannot parse {CANARY!r}", "type": CANARY, "code": CANARY}}, status)
            ask(CHAT, {**prompt, "stream": stream})
            hostile.says(CANARY.encode(), status, Content_Type="text/plain")
            ask(CHAT, {**prompt, "stream": stream})
        hostile.says(b'data: {"error": {"message": "' + CANARY.encode() + b'"}}\n\n', Content_Type="text/event-stream")
        ask(CHAT, {**prompt, "stream": stream})
        hostile.drop = True
        ask(CHAT, {**prompt, "stream": stream})
    return answers


def test_24_no_prompt_is_in_a_log_a_record_a_metric_or_an_error(fleet: FleetFolder) -> None:
    (fleet.folder / "scheduler.rhai").write_text(
        "fn route_task(task, workers) { if task.prompt_bytes > 1 { throw `no ${task}` } workers[0] }"
    )
    with hostile_server() as server, beside(fleet, server) as running:
        own = [body for body in provoke(running, server) if CANARY.encode() in body]
        # What an engine says of a request is for its client, and for nobody else.
        assert all(b"cannot parse" in body or body.count(CANARY.encode()) == 1 for body in own)
        assert running.ask("POST", CHAT, chat(), **bearer(running.key("k"))).status >= 500  # still dropping
        for path in ("/metrics", "/v1/orchestrator/status", "/v1/orchestrator/scheduler/decisions", "/v1/hives"):
            assert CANARY.encode() not in running.queen.client.send("GET", path).read(), path
        assert CANARY.encode() not in running.ask("GET", "/v1/jobs?limit=100", **bearer(running.key("k"))).body
        log, home = running.queen.log, running.queen.home
        until(lambda: (home / "state" / "decisions.jsonl").exists(), "the decisions to be written")
        kept = {path: path.read_bytes() for path in files(home)}
        assert any(path.name == "records.sqlite" for path in kept)
        assert [path for path, data in kept.items() if CANARY.encode() in data] == []
    assert [line for line in log if CANARY in line] == []
    assert [line for line in log if "Traceback" in line] == []
    assert [path for path in files(home) if CANARY.encode() in path.read_bytes()] == []


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]
