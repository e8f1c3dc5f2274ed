"""Who may ask a hive, and what bad requests are answered."""

from __future__ import annotations

import json
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import pytest
from hive_rig import RunningHive

ROUTES = [
    ("GET", "/v1/hive"),
    ("GET", "/v1/hive/watch"),
    ("GET", "/v1/workers"),
    ("POST", "/v1/workers"),
    ("DELETE", "/v1/workers/trial"),
    ("GET", "/v1/workers/trial/log"),
    ("GET", "/v1/models"),
    ("POST", "/v1/models"),
    ("DELETE", "/v1/models/mine"),
]


def ask(
    hive: RunningHive, method: str, path: str, body: str | None = None, token: str | None = None
) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", urlsplit(hive.url).port, timeout=60)
    connection.request(method, path, body, {} if token is None else {"Authorization": f"Bearer {token}"})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def test_every_route_but_health_needs_the_token(hive: RunningHive) -> None:
    assert ask(hive, "GET", "/health")[0] == 200
    for method, path in ROUTES:
        for token in (None, "", "wrong", hive.token + "x", hive.token[:-1], "ä"):
            status, body = ask(hive, method, path, "{}", token)
            assert (status, body["error"]["type"]) == (401, "authentication_error"), (method, path, token)


def test_a_worker_speaks_for_itself_only(hive: RunningHive) -> None:
    one, two = hive.ready("trial"), hive.ready("trial")
    assert one.access is not None
    assert two.access is not None
    news = {"name": one.name, "pid": 1, "port": 1, "state": "failed", "reason": "a lie"}
    for token in (two.access.token, hive.token, None):
        assert ask(hive, "POST", "/v1/workers/ready", json.dumps(news), token)[0] == 401
    assert ask(hive, "POST", "/v1/workers/ready", json.dumps({**news, "name": "nobody"}), one.access.token)[0] == 404
    assert {worker.reason for worker in hive.workers().values()} == {""}
    assert one.access.token != two.access.token


BAD: list[tuple[str, str, str, int, str | None]] = [
    ("POST", "/v1/workers", "", 400, None),
    ("POST", "/v1/workers", "{", 400, None),
    ("POST", "/v1/workers", "[" * 100_000, 400, None),
    ("POST", "/v1/workers", "{}", 400, "model"),
    ("POST", "/v1/workers", '{"model": "trial", "backend": 7}', 400, "backend"),
    ("POST", "/v1/workers", '{"model": "../x", "backend": "trial"}', 400, "model"),
    ("POST", "/v1/workers", '{"model": "trial", "backend": "trial", "port": 70000}', 400, "port"),
    ("POST", "/v1/workers", '{"model": "trial", "backend": "trial", "name": "../x"}', 400, "name"),
    ("POST", "/v1/workers", '{"model": "trial", "backend": "trial", "device": "cuda"}', 400, "device"),
    ("POST", "/v1/workers", '{"model": "trial", "backend": "trial", "options": {"x": "1"}}', 400, "options.x"),
    ("POST", "/v1/models", '{"path": ""}', 400, "path"),
    ("DELETE", "/v1/workers/nobody", "", 404, "name"),
    ("DELETE", "/v1/workers/..%2F..%2Fetc", "", 404, "name"),
    ("DELETE", "/v1/workers/trial?wait=soon", "", 400, "wait"),
    ("PUT", "/v1/workers", "", 405, None),
    ("GET", "/v1/elsewhere", "", 404, None),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "param"), BAD)
def test_bad_requests(hive: RunningHive, method: str, path: str, body: str, status: int, param: str | None) -> None:
    got, answer = ask(hive, method, path, body, hive.token)
    assert (got, answer["error"]["param"]) == (status, param), answer
    assert answer["error"]["message"]
    assert hive.workers() == {}
