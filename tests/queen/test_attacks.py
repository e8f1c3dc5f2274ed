"""Attacks on who may call, by their numbers in docs/security.md: keys, tenants, the fleet's control, web pages."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attack_rig import CHAT, METHODS, OPEN, Told, Victim, bearer, chat, filled, raw, routes, serving, shaped, victim
from queen_rig import FleetFolder
from redis_rig import running_redis

from rbee.errors import AccessDenied
from rbee.queen.keys import METRICS, PREFIX, KeyStore
from rbee.testing.programs import until

OPERATORS = ("/v1/orchestrator", "/v1/hives", "/gitops")


@pytest.fixture(scope="module")
def away() -> Iterator[Victim]:
    """Return a queen that listens everywhere, and is called from elsewhere."""
    with victim() as found:
        yield found


def test_1_without_a_key_that_opens_every_route_and_method_says_the_same(away: Victim) -> None:
    asked, bodies = 0, set()
    with away.connected() as connection:
        for what, headers in away.bad_keys().items():
            for path in routes():
                for method in METHODS:
                    if (method, path) in OPEN:
                        continue
                    told = away.ask(method, filled(path), b"{}", on=connection, **headers)
                    asked += 1
                    assert told.status == 401, (what, method, path, told.body)
                    assert told.headers["www-authenticate"] == 'Bearer realm="rbee"'
                    assert "x-rbee-job" not in told.headers
                    if method != "HEAD":
                        bodies.add((path.startswith("/v1/messages"), told.body))
    assert asked > 3000
    # Anthropic's routes wrap the same words in their own form.
    assert len(bodies) == 2
    for anthropic, body in bodies:
        error = Told(401, {}, body).error
        assert error["type"] == "authentication_error"
        assert error["code"] == "invalid_api_key"
        assert ("type" in json.loads(body)) == anthropic
    assert not away.queen.log[1:], "a refused key is no reason to write a log"


def test_1_what_is_open_without_a_key_tells_nothing_of_the_fleet(away: Victim) -> None:
    for method, path in OPEN:
        told = away.ask(method, path)
        assert told.status == 200
        for word in (str(away.queen.home), away.queen.record.token, 'hives": [{'):
            assert word.encode() not in told.body


def test_1_nobody_speaks_for_another_process_or_queen_without_its_token() -> None:
    whole = {"id": "operator", "name": "operator", "scopes": ["inference", "admin", "metrics"], "policy": {}}
    caller = base64.urlsafe_b64encode(json.dumps(whole).encode()).decode()
    forged = [
        {"X-Rbee-Peer": token, "X-Rbee-Peer-Caller": caller, "X-Rbee-Peer-Reach": reach}
        for token in ("", "wrong")
        for reach in ("process", "queen", "")
    ]
    with running_redis() as redis, victim("--processes", "2", "--state", redis.url) as found:
        good = bearer(found.key("good"))
        with found.connected() as connection:
            for path, methods in routes().items():
                for method in methods - {method for method, open_path in OPEN if open_path == path}:
                    # An id may name another process, or a queen that nobody knows.
                    for value in ("x", "job_18ea0_aaaaaa0", "file-18ea0_aaaaaa1", "batch_18ea0_aaaaaa9"):
                        for headers in ({}, *forged, {"X-Rbee-Peer-Reach": "process"}):
                            told = found.ask(method, filled(path, value), b"{}", on=connection, **headers)
                            assert told.status == 401, (headers, method, path, value, told.body)
        for headers in forged:
            assert found.ask("GET", "/v1/models", **good, **headers).status == 401
        assert found.ask("GET", "/v1/models", **good).status == 200


def test_2_keys_that_are_no_text_or_too_long_are_refused_before_anything_is_looked_up(away: Victim) -> None:
    good = bearer(away.key("good"))
    for secret in (b"a" * 4000, b"%00", b"\xff\xfe", b"rbee_sk_" + b"\xc3\xa9" * 28, b"'; DROP TABLE keys; --"):
        answer = raw(away.queen, b"GET /v1/models HTTP/1.1\r\nHost: elsewhere\r\nConnection: close\r\n"
                     b"Authorization: Bearer " + secret + b"\r\n\r\n")  # fmt: skip
        assert answer.startswith(b"HTTP/1.1 401 "), answer
    # Not even valid HTTP (RFC 9110, 5.5), and longer than any head may be.
    for secret in (b"a\0b", b"a" * 1_000_000):
        answer = raw(away.queen, b"GET /v1/models HTTP/1.1\r\nHost: elsewhere\r\n"
                     b"Authorization: Bearer " + secret + b"\r\n\r\n")  # fmt: skip
        assert answer.startswith(b"HTTP/1.1 400 "), answer[:200]
    assert away.ask("GET", "/v1/models", **good).status == 200
    assert not away.queen.log[1:]


def test_2_an_unknown_key_takes_the_steps_of_a_wrong_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number, where a clock would only measure this machine's other work."""
    store = KeyStore(tmp_path / "keys.sqlite")
    good = store.create("good")[1]
    steps: list[tuple[str, int]] = []
    digest, compare = hmac.digest, hmac.compare_digest

    def counted_digest(key: bytes, message: bytes, algorithm: str) -> bytes:
        steps.append(("hmac", len(message)))
        return digest(key, message, algorithm)

    def counted_compare(one: bytes, other: bytes) -> bool:
        steps.append(("compare", len(one) + len(other)))
        return compare(one, other)

    monkeypatch.setattr(hmac, "digest", counted_digest)
    monkeypatch.setattr(hmac, "compare_digest", counted_compare)
    known_id = good.removeprefix(PREFIX)[:8]
    taken = []
    for secret in (shaped("00000000" + "a" * 43), shaped(known_id + "a" * 43), good[:-1] + "."):
        steps.clear()
        with pytest.raises(AccessDenied):
            store.check(secret)
        taken.append(list(steps))
    assert taken[0] == taken[1] == taken[2] == [("hmac", len(good)), ("compare", 64)]


@pytest.fixture(scope="module")
def honey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """Return a queen with a server, which is called from elsewhere."""
    with serving(FleetFolder(tmp_path_factory.mktemp("fleet") / "inventory")) as (found, _):
        yield found


def upload(honey: Victim, headers: dict[str, str]) -> str:
    line = json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": chat("sesame")})
    form = (
        '--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--B\r\n'
        f'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{line}\n\r\n--B--\r\n'
    )
    made = honey.ask("POST", "/v1/files", form.encode(), Content_Type="multipart/form-data; boundary=B", **headers)
    assert made.status == 200, made.body
    return str(json.loads(made.body)["id"])


def test_3_what_belongs_to_another_tenant_is_not_there(honey: Victim) -> None:
    mine, other = bearer(honey.tenant("acme")), bearer(honey.tenant("evil"))
    job = json.loads(honey.ask("POST", "/v1/jobs", {"endpoint": CHAT, "body": chat("sesame")}, **mine).body)["job_id"]
    file = upload(honey, mine)
    wanted = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    batch = json.loads(honey.ask("POST", "/v1/batches", wanted, **mine).body)["id"]
    places = {f"/v1/jobs/{job}": job, f"/v1/jobs/{job}/stream": job, f"/v1/files/{file}": file,
              f"/v1/files/{file}/content": file, f"/v1/batches/{batch}": batch}  # fmt: skip
    for path, known in places.items():
        until(lambda path=path: honey.ask("GET", path, **mine).status == 200, path)  # type: ignore[misc]
        for method in ("GET", "DELETE", "POST") if "batches" not in path else ("GET",):
            told, invented = honey.ask(method, path, **other), honey.ask(method, path.replace(known, "z"), **other)
            assert told.status == invented.status, (method, path, told.body)
            assert told.status in (404, 405)
            assert told.body.replace(known.encode(), b"z") == invented.body
            assert b"sesame" not in told.body
    assert honey.ask("POST", f"/v1/batches/{batch}/cancel", **other).status == 404
    assert honey.ask("POST", "/v1/batches", wanted, **other).status in (400, 404)
    for path, own in ({"/v1/jobs": job, "/v1/files": file, "/v1/batches": batch}).items():
        assert own.encode() not in honey.ask("GET", path, **other).body
        assert json.loads(honey.ask("GET", f"{path}?after={own}", **other).body)["data"] == []
        assert own.encode() in honey.ask("GET", path, **mine).body
    # Nothing of what the other tenant tried has had an effect.
    assert honey.ask("GET", f"/v1/files/{file}/content", **mine).body.count(b"sesame") == 1
    until(lambda: json.loads(honey.ask("GET", f"/v1/batches/{batch}", **mine).body)["status"] == "completed", "it")
    output = json.loads(honey.ask("GET", f"/v1/batches/{batch}", **mine).body)["output_file_id"]
    assert honey.ask("GET", f"/v1/files/{output}/content", **other).status == 404


def test_3_usage_and_repeated_requests_are_a_tenants_own(honey: Victim) -> None:
    mine, other = bearer(honey.tenant("bees")), bearer(honey.tenant("wasps"))
    first = honey.ask("POST", CHAT, chat("sesame"), Idempotency_Key="same", **mine)
    second = honey.ask("POST", CHAT, chat("something else"), Idempotency_Key="same", **other)
    assert (first.status, second.status) == (200, 200), second.body
    assert b"something else" in second.body
    until(lambda: b"bees" in honey.ask("GET", "/metrics", **mine).body, "the job to be counted")
    assert b"bees" not in honey.ask("GET", "/metrics", **other).body
    assert b'tenant="' not in honey.ask("GET", "/metrics", **other).body.replace(b'tenant="wasps"', b"")


def test_4_a_key_for_models_controls_nothing(honey: Victim) -> None:
    keys = {"inference": bearer(honey.key("plain")), "tenant": bearer(honey.tenant("acme")),
            "metrics": bearer(honey.key("prometheus", scopes=frozenset({METRICS})))}  # fmt: skip
    asked = 0
    for what, key in keys.items():
        for path, methods in routes().items():
            # A plain key is the operator's own, and may see how far the reconciler is.
            if not path.startswith(OPERATORS) or (what, path) == ("inference", "/gitops/status"):
                continue
            for method in methods:
                told = honey.ask(method, filled(path), b"{}", **key)
                asked += 1
                assert told.status in (401, 403), (what, method, path, told.body)
        for method, path in (("GET", "/admin"), ("PUT", "/config"), ("DELETE", "/hives/x"), ("POST", "/config/update")):
            assert honey.ask(method, path, b"{}", **key).status == 404
    assert asked > 40
    assert honey.ask("POST", CHAT, chat(), **keys["metrics"]).status == 403


PAGES: list[dict[str, str]] = [
    {"Host": "rebound.example:7833"},
    {"Host": "localhost.evil.example"},
    {"Host": "127.0.0.1.nip.io"},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost.evil.example"},
    {"Origin": "https://evil.example", "Host": "rebound.example"},
    {"Sec-Fetch-Site": "cross-site"},
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: " ".join(page.values()))
def test_23_a_browsers_page_cannot_use_what_needs_no_key(honey: Victim, page: dict[str, str]) -> None:
    here: Any = Victim(honey.queen, "127.0.0.1", honey.port, {})
    jobs = len(json.loads(here.ask("GET", "/v1/jobs").body)["data"])
    for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("POST", "/v1/jobs"), ("DELETE", "/v1/jobs/x")):
        # What a form may send without asking first.
        told = here.ask(method, path, json.dumps(chat()).encode(), Content_Type="text/plain", **page)
        assert told.status == 403, (path, told.body)
        assert told.error["type"] == "permission_error"
    preflight = here.ask("OPTIONS", CHAT, Access_Control_Request_Method="POST", **page)
    assert preflight.status == 403
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    assert here.ask("GET", "/v1/orchestrator/status", **page).status == 401
    assert len(json.loads(here.ask("GET", "/v1/jobs").body)["data"]) == jobs


def test_23_no_answer_lets_another_origin_read_it(honey: Victim) -> None:
    here = Victim(honey.queen, "127.0.0.1", honey.port, {})
    for headers in ({"Origin": "http://localhost:3000"}, bearer(honey.key("k")) | {"Origin": "https://app.example"}):
        for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/health"), ("GET", "/metrics")):
            told = here.ask(method, path, chat(), **headers)
            assert told.status == 200, (path, told.body)
            assert not [name for name in told.headers if name.startswith("access-control")]
