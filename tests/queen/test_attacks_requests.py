"""Attacks with what a request asks for, by their numbers in docs/security.md: addresses, fields, words that leak."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from attack_rig import CHAT, Victim, bearer, beside, chat, raw, victim
from hostile_server import HostileServer, Trap, hostile_server, trap
from queen_rig import FleetFolder, view

from rbee.queen.policy import Policy
from rbee.testing.programs import until


@pytest.fixture(scope="module")
def hostile() -> Iterator[HostileServer]:
    with hostile_server() as server:
        yield server


@pytest.fixture(scope="module")
def found(hostile: HostileServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with beside(FleetFolder(tmp_path_factory.mktemp("fleet") / "inventory"), hostile) as running:
        yield running


@pytest.fixture
def bait() -> Iterator[Trap]:
    with trap() as port:
        yield port


def test_5_no_request_has_the_queen_call_an_address(found: Victim, hostile: HostileServer, bait: Trap) -> None:
    key = bearer(found.key("k"))
    hostile.uses("3", "3")
    jobs = len(hostile.bodies)
    for fields in ({"api_base": bait.url}, {"base_url": bait.url}, {"api_base": [bait.url]}):
        told = found.ask("POST", CHAT, chat() | fields, **key)
        assert (told.status, told.error["param"]) == (400, next(iter(fields)))
    for model in (
        bait.url,
        f"{bait.url}/v1",
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "../../x",
    ):
        assert found.ask("POST", CHAT, chat(model=model), **key).error["code"] == "model_not_found"
        made = json.loads(found.ask("POST", "/v1/jobs", {"endpoint": CHAT, "body": chat(model=model)}, **key).body)
        until(lambda made=made: b'"failed"' in found.ask("GET", f"/v1/jobs/{made['job_id']}", **key).body, "it to fail")  # type: ignore[misc]
    assert found.ask("POST", CHAT, chat(), X_Rbee_Hive=bait.url, **key).status == 400
    assert found.ask("POST", "/v1/jobs", {"endpoint": f"{bait.url}/v1", "body": chat()}, **key).status == 400
    assert len(hostile.bodies) == jobs
    image: Any = [{"type": "image_url", "image_url": {"url": f"{bait.url}/x.png"}}]
    asked: list[dict[str, Any]] = [
        {"hive": bait.url, "url": bait.url, "callback": bait.url, "metadata": {"webhook": bait.url}},
        {"messages": [{"role": "user", "content": image}]},
    ]
    for more in asked:
        told = found.ask("POST", CHAT, chat() | more, **key)
        assert told.status == 200, told.body
        assert told.headers["x-rbee-worker"] == "desk/says"
    absolute = f"GET {bait.url}/v1/models HTTP/1.1\r\nHost: {bait.at}\r\nConnection: close\r\n\r\n"
    assert b"desk/says" in raw(found.queen, absolute.encode()), "her own list, not another's"
    assert raw(found.queen, f"CONNECT {bait.at} HTTP/1.0\r\nHost: {bait.at}\r\n\r\n".encode()).startswith(b"HTTP/1.1 4")
    assert not bait.called


def schema(pattern: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}}


def tool(parameters: object) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


HOSTILE: list[dict[str, Any]] = [
    {"n_discard": -1},
    {"n_discard": 2**31},
    {"id_slot": 0},
    {"prompt_embeds": "gASVDAAAAAAAAACMBXBvc2l4lIwG"},
    {"grammar": '%llguidance {}\nstart: "a"'},
    {"grammar": 'root ::= "a"\n%llguidance {}'},
    tool(schema("(a+)+$")),
    tool(schema("^(([a-z])+.)+[A-Z]([a-z])+$(x+x+)+y")),
    tool(schema("a{1,1000000}")),
    tool(schema("((a{1000}){1000}){1000}")),
    tool(schema("a" * 5000)),
    tool(nested(100)),
    tool({"enum": [{"a": n} for n in range(30_000)]}),
    {"tools": [{}] * 129},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema("(.*)*")}}},
    {"logit_bias": {"1": 1e6}},
    {"logit_bias": {str(n): 1 for n in range(100_000)}},
    {"max_tokens": -1},
    {"max_tokens": 0},
    {"max_tokens": 2**63},
    {"max_completion_tokens": 2**63 - 1},
    {"max_tokens": 1e300},
    {"n": 10**6},
    {"top_logprobs": 10**6},
    {"stop": ["a"] * 1000},
    {"seed": 2**64},
    {"stream": "true"},
]


@pytest.mark.parametrize("fields", HOSTILE, ids=lambda fields: json.dumps(fields)[:60].replace("\\n", " "))
def test_9_hostile_fields_are_refused_before_any_worker_is_called(
    found: Victim, hostile: HostileServer, fields: dict[str, Any]
) -> None:
    jobs = len(hostile.bodies)
    told = found.ask("POST", CHAT, chat() | fields, **bearer(found.key("k")))
    assert told.status == 400, told.body
    error = told.error
    assert error["type"] == "invalid_request_error"
    assert next(iter(fields)) in f"{error['param']} {error['message']}"
    assert len(hostile.bodies) == jobs


def test_9_what_only_looks_like_it_goes_through(found: Victim, hostile: HostileServer) -> None:
    hostile.uses("3", "3")
    key = bearer(found.key("k"))
    for fields in (
        {"grammar": 'root ::= "yes" | "no"'},
        tool(schema(r"^[\w.+-]+@[\w-]+(\.[\w-]+)+$")),
        tool(nested(20)),
        {"max_tokens": 2**31 - 1, "logit_bias": {"1": -100}, "stop": ["(a+)+"]},
    ):
        assert found.ask("POST", CHAT, chat("(a+)+ %llguidance") | fields, **key).status == 200


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_13_a_server_that_redirects_is_not_followed(
    found: Victim, hostile: HostileServer, bait: Trap, status: int
) -> None:
    for stream in (False, True):
        hostile.says(b"", status, Location=f"{bait.url}/v1/chat/completions")
        told = found.ask("POST", CHAT, chat(stream=stream), **bearer(found.key("k")))
        assert told.status in (502, 503), told.body
        assert bait.at.encode() not in told.body
        assert "location" not in told.headers
    hostile.uses("1", "1")
    assert not bait.called


def test_13_a_server_that_redirects_from_the_start_is_told_of(fleet: FleetFolder, bait: Trap) -> None:
    with hostile_server() as server:
        server.probe_status, server.headers = 307, {"Location": f"{bait.url}/v1/models"}
        fleet.write(desk=["HivePort none", f"Worker says model=honey url={server.url}"])
        with victim("--inventory", str(fleet.folder)) as running:
            until(lambda: "redirects" in str(view(running.queen, "desk")), "the redirect to be told of")
            assert running.queen.client.send("GET", "/v1/models").read().count(b"honey") == 0
    assert not bait.called


def test_13_keys_go_where_they_belong_and_nowhere_else(fleet: FleetFolder) -> None:
    with hostile_server() as server, hostile_server() as other:
        server.uses("1", "1")
        other.uses("1", "1")
        line = f"Worker other model=nectar url={other.url}"
        with beside(fleet, server, line, key="sesame") as running:
            secret = running.key("k")
            sent = {**bearer(secret), "Cookie": f"session={secret}", "X_Other": secret, "Proxy_Authorization": secret}
            for model in ("honey", "nectar"):
                assert running.ask("POST", CHAT, chat(model=model), **sent).status == 200
        assert {one.get("authorization") for one in server.seen} == {"Bearer sesame"}
        assert {one.get("authorization") for one in other.seen} == {None}
        assert (len(server.seen), len(other.seen)) == (1, 1)
        for one in (*server.seen, *other.seen):
            assert secret not in str(one)


def test_each_refusal_is_the_right_class_of_openais_client(found: Victim, hostile: HostileServer) -> None:
    hostile.uses("3", "3")
    url = f"http://{found.host}:{found.port}/v1"

    def client(secret: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=url, api_key=secret, max_retries=0, default_headers=found.away)

    def ask(secret: str, **fields: Any) -> Any:
        with client(secret) as calls:
            return calls.chat.completions.create(**{**chat(), **fields})

    good, few = found.key("k"), found.key("few", policy=Policy(requests_per_day=1))
    for secret in ("wrong", found.bad_keys()["expired"]["Authorization"].removeprefix("Bearer ")):
        with pytest.raises(openai.AuthenticationError):
            ask(secret)
    with pytest.raises(openai.PermissionDeniedError):
        ask(found.key("narrow", policy=Policy(models=("other",))))
    with pytest.raises(openai.BadRequestError) as refused:
        ask(good, extra_body={"api_base": "http://evil.example"})
    assert refused.value.param == "api_base"
    with pytest.raises(openai.NotFoundError):
        ask(good, model="none")
    with client(good) as calls, pytest.raises(openai.NotFoundError):
        calls.files.retrieve("file-of-somebody-else")
    assert ask(few).choices[0].message.content == "hi"
    with pytest.raises(openai.RateLimitError) as limited:
        ask(few)
    assert limited.value.code == "insufficient_quota"
    once = {"extra_headers": {"Idempotency-Key": "one"}}
    ask(good, **once)
    with pytest.raises(openai.ConflictError):
        ask(good, messages=chat("other")["messages"], **once)
    hostile.says({"error": {"message": "broken"}}, 500)
    with pytest.raises(openai.InternalServerError):
        ask(good)
    hostile.uses("3", "3")
