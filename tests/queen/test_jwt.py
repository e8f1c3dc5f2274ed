"""Tokens of an issuer: which open, which do not, and how its keys are had. Real signatures throughout."""

from __future__ import annotations

import base64
import http.client
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from jwt.algorithms import OKPAlgorithm, RSAAlgorithm

from rbee.errors import AccessDenied, Busy, Forbidden, SetupProblem
from rbee.queen.access import Access
from rbee.queen.jwt_tokens import JwtTokens, read_jwt_settings
from rbee.queen.keys import KeyStore
from rbee.queen.policy import Policy
from rbee.queen.settings import Settings
from rbee.testing.programs import RunningQueen, running_queen
from rbee.wire.jwt_settings import Claims, JwtSettings, TierLimits

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
ED_KEY = ed25519.Ed25519PrivateKey.generate()
STRANGER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
ISSUER, AUDIENCE = "https://id.example", "rbee"
AWAY = {"REMOTE_ADDR": "192.0.2.7", "HTTP_HOST": "queen:7833"}


def published(*names: str) -> bytes:
    keys = {
        "rsa": RSAAlgorithm.to_jwk(RSA_KEY.public_key(), as_dict=True),
        "ed": OKPAlgorithm.to_jwk(ED_KEY.public_key(), as_dict=True),
    }
    return json.dumps({"keys": [{**keys[name], "kid": name} for name in names]}).encode()


def token(kid: str | None = "rsa", key: Any = None, algorithm: str = "", **claims: Any) -> str:
    told = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": time.time() + 600, **claims}
    key = key or {"rsa": RSA_KEY, "ed": ED_KEY}.get(kid or "", RSA_KEY)
    algorithm = algorithm or ("EdDSA" if key is ED_KEY else "RS256")
    told = {name: value for name, value in told.items() if value is not None}
    return jwt.encode(told, key, algorithm=algorithm, headers={"kid": kid} if kid else {})


class Issuer:
    """What is published, how often it was asked for, and a clock."""

    def __init__(self) -> None:
        self.keys: bytes | Exception = published("rsa", "ed")
        self.asked = 0
        self.now_s = 1000.0

    def fetch(self, url: str) -> bytes:
        self.asked += 1
        if isinstance(self.keys, Exception):
            raise self.keys
        return self.keys

    def tokens(self, **fields: Any) -> JwtTokens:
        settings = JwtSettings(issuer=ISSUER, audience=AUDIENCE, jwks="https://id.example/keys", **fields)
        return JwtTokens(settings, fetch=self.fetch, clock=lambda: self.now_s)


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.mark.parametrize("kid", ["rsa", "ed"])
def test_a_signed_token_opens_and_its_claims_are_what_it_allows(issuer: Issuer, kid: str) -> None:
    tokens = issuer.tokens(tiers={"gold": TierLimits(requests_per_minute=9, priority="normal")})
    found = tokens.check(token(kid, tenant="acme", tier="gold", models=["qwen*"], scope="openid inference metrics"))
    assert (found.id, found.name, found.scopes) == ("jwt:ada", "ada", frozenset({"inference", "metrics"}))
    assert found.policy == Policy(
        tenant="acme", tier="gold", models=("qwen*",), requests_per_minute=9, priority="normal"
    )


def test_claims_can_have_other_names(issuer: Issuer) -> None:
    tokens = issuer.tokens(claims=Claims(tenant="https://acme/org", tier="app.plan"))
    found = tokens.check(token("rsa", None, "", **{"https://acme/org": "acme", "app": {"plan": "gold"}}))
    assert (found.policy.tenant, found.policy.tier) == ("acme", "gold")


def unsigned(header: str) -> str:
    """Return what has the form of a token, with a header as it is given."""
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (header.encode(), b"{}", b"x"))


WRONG = {
    "a header 3,000 deep": unsigned('{"a":' + "[" * 2999 + "]" * 2999 + "}"),
    "a header that is no object": unsigned('{"alg":"RS256"}').replace("ey", "eyJ", 1),
    "a key id of a wrong type": unsigned('{"alg": "RS256", "kid": ["rsa"]}'),
    "an algorithm of a wrong type": unsigned('{"alg": {"a": 1}, "kid": "rsa"}'),
    "a number without end": unsigned('{"alg": ' + "9" * 5000 + "}"),
    "a header that names its own keys": unsigned('{"alg": "RS256", "kid": "x", "jku": "https://evil.example/keys"}'),
    "no text": "ey\xff.é.\0",
    "expired": token(exp=time.time() - 120),
    "not yet": token(nbf=time.time() + 600),
    "no end": token(exp=None),
    "no subject": token(sub=None),
    "another issuer": token(iss="https://evil.example"),
    "another audience": token(aud="other"),
    "a stranger's key": token(key=STRANGER),
    "a stranger's key id": token("stranger", key=STRANGER),
    "no signature": jwt.encode(
        {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": time.time() + 600}, "", algorithm="none"
    ),
    "the public key as a secret": jwt.encode(
        {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": time.time() + 600}, "x" * 64, "HS256", {"kid": "rsa"}
    ),
    "an algorithm that is not allowed": token(algorithm="RS512"),
    "no model": token(models=[]),
    "models of a wrong type": token(models={"all": True}),
    "a tenant of a wrong type": token(tenant=["a"]),
    "a tenant that is no name": token(tenant="a b\n"),
    "no token": "ey..",
    "too long": token(padding="x" * 9000),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_token_does_not_open(issuer: Issuer, wrong: str) -> None:
    tokens = issuer.tokens()
    with pytest.raises(AccessDenied) as refused:
        tokens.check(wrong)
    assert refused.value.status == 401
    assert tokens.known(wrong) is None


def test_a_checked_token_is_known_until_it_expires(issuer: Issuer) -> None:
    tokens, good = issuer.tokens(), token()
    assert tokens.known(good) is None
    found = tokens.check(good)
    assert tokens.known(good) is found
    issuer.now_s += 61
    assert tokens.known(good) is None
    short = token(exp=time.time() - 30)  # within the leeway, and over already
    tokens.check(short)
    assert tokens.known(short) is None


def test_keys_are_fetched_once_and_again_for_a_new_one(issuer: Issuer) -> None:
    issuer.keys = published("rsa")
    tokens = issuer.tokens()
    for _ in range(5):
        tokens.check(token())
    assert issuer.asked == 1
    issuer.keys = published("rsa", "ed")
    for _ in range(5):
        with pytest.raises(AccessDenied):
            tokens.check(token("ed"))
    assert issuer.asked == 1
    issuer.now_s += 11
    tokens.check(token("ed"))
    assert issuer.asked == 2


def test_a_key_that_was_withdrawn_opens_no_more(issuer: Issuer) -> None:
    tokens = issuer.tokens()
    tokens.check(token())
    issuer.keys = published("ed")
    issuer.now_s += 301
    with pytest.raises(AccessDenied):
        tokens.check(token())


@pytest.mark.parametrize("trouble", [OSError("down"), TimeoutError(), b"<html>", b"{}", b"[]", b'{"keys": 1}', b"\xff"])
def test_an_issuer_that_fails_leaves_its_keys_in_force(issuer: Issuer, trouble: bytes | Exception) -> None:
    good, issuer.keys = issuer.keys, trouble
    tokens = issuer.tokens()
    with pytest.raises(Busy) as busy:
        tokens.check(token())
    assert busy.value.status == 503
    issuer.keys = good
    issuer.now_s += 11
    tokens.check(token())
    issuer.keys = trouble
    issuer.now_s += 1000
    tokens.check(token())


def test_a_single_key_without_a_name_needs_none(issuer: Issuer) -> None:
    issuer.keys = json.dumps({"keys": [RSAAlgorithm.to_jwk(RSA_KEY.public_key(), as_dict=True)]}).encode()
    assert issuer.tokens().check(token(None)).name == "ada"


def write(folder: Path, **fields: object) -> Path:
    path = folder / "jwt.yaml"
    path.write_text(json.dumps({"issuer": ISSUER, "audience": AUDIENCE, "jwks": "keys.json", **fields}))
    (folder / "keys.json").write_bytes(published("rsa"))
    return path


def test_keys_can_lie_beside_the_settings(tmp_path: Path) -> None:
    assert read_jwt_settings(tmp_path / "jwt.yaml") is None
    settings = read_jwt_settings(write(tmp_path))
    assert settings is not None
    assert JwtTokens(settings).check(token()).name == "ada"


@pytest.mark.parametrize("fields", [{"jwks": "http://id.example"}, {"issuer": ""}, {"algorithms": ["HS256"]}, {"x": 1}])
def test_wrong_settings_name_the_file(tmp_path: Path, fields: dict[str, object]) -> None:
    with pytest.raises(SetupProblem, match=r"jwt\.yaml"):
        read_jwt_settings(write(tmp_path, **fields))


def test_a_token_opens_the_queen_beside_keys(tmp_path: Path) -> None:
    settings = read_jwt_settings(write(tmp_path))
    assert settings is not None
    keys = KeyStore(tmp_path / "keys.sqlite")
    access = Access(Settings(state_dir=tmp_path), keys, JwtTokens(settings))
    key, secret = keys.create("k")

    def environ(bearer: str) -> dict[str, str]:
        return {**AWAY, "HTTP_AUTHORIZATION": f"Bearer {bearer}"}

    for _ in range(2):
        assert access.caller(environ(token(tenant="acme"))).tenant == "acme"
    assert access.caller(environ(secret)).id == key.id
    with pytest.raises(AccessDenied):
        access.caller(environ(token(key=STRANGER)))
    with pytest.raises(Forbidden):
        access.caller(environ(token(scope="metrics")))
    with pytest.raises(Forbidden):
        access.operator(environ(token()))
    assert access.operator(environ(token(scope=["admin"]))).name == "ada"
    assert access.reader(environ(token(tenant="acme"))).tenant == "acme"
    with pytest.raises(Forbidden):
        access.reader(environ(token()))


def get(queen: RunningQueen, bearer: str) -> int:
    connection = http.client.HTTPConnection(urlsplit(queen.url).netloc, timeout=60)
    connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {bearer}"})
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_running_queen_takes_tokens(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    write(tmp_path / "config")
    with running_queen("--no-hive", home=tmp_path) as queen:
        assert [get(queen, token()) for _ in range(2)] == [200, 200]
        assert [get(queen, token(key=STRANGER)) for _ in range(2)] == [401, 401]
        assert get(queen, "anything-an-editor-insists-on") == 200
        assert "Traceback" not in "\n".join(queen.log)


def test_a_queen_with_wrong_settings_says_so_and_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    write(tmp_path / "config", algorithms=["HS256"])
    with pytest.raises(RuntimeError, match=r"jwt\.yaml") as failed, running_queen("--no-hive", home=tmp_path):
        pass
    assert "Traceback" not in str(failed.value)
