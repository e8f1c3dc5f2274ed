"""JSON Web Tokens besides API keys (RFC 7519, RFC 8725): checked against an issuer's published keys (RFC 7517).

`jwt.yaml` in the inventory names the issuer. Its keys come from a file or an https URL; they are fetched once, again
when they are old or a token names an unknown one, and never by the request that would have to wait for a slow issuer
for long. PyJWT is imported with the first token.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from rbee.errors import AccessDenied, Busy, InvalidInput, SetupProblem
from rbee.queen.keys import SCOPES
from rbee.queen.policy import Policy, policy_of
from rbee.wire.jwt_settings import EXPLAINED, JwtSettings, TierLimits

if TYPE_CHECKING:
    from jwt import PyJWK

log = logging.getLogger("rbee.queen.jwt")

MAX_JWKS_BYTES = 1024 * 1024
MAX_TOKEN_CHARS = 8192
MAX_CACHED = 4096
CACHED_S = 60.0
FETCH_TIMEOUT_S = 5.0
FETCH_AGAIN_S = 10.0
"""An unknown key id, or a failed fetch, makes a new fetch no more often than this."""


class Identity(Struct, frozen=True):
    """Whom a token names, and what it allows."""

    id: str
    name: str
    scopes: frozenset[str]
    policy: Policy


def read_jwt_settings(path: Path) -> JwtSettings | None:
    """Return what `jwt.yaml` says, or None without the file. Raises: SetupProblem."""
    from rbee.wire.settings import read_settings

    if not path.exists():
        return None
    if find_spec("jwt") is None:
        raise SetupProblem(f"{path} is there, but tokens need PyJWT", hint="pip install 'rbee[jwt]'")
    settings = read_settings(path, JwtSettings, hint=EXPLAINED)
    if settings.jwks.startswith("http://"):
        raise SetupProblem(f"{path}: jwks must be a file or an https URL: whoever changes it on its way signs tokens")
    if not settings.jwks.startswith("https://"):
        settings = msgspec.structs.replace(settings, jwks=str(path.parent / settings.jwks))
    return settings


class JwtTokens:
    """Checks tokens. `check` may wait for a signature or the issuer: call it off the event loop."""

    def __init__(
        self,
        settings: JwtSettings,
        *,
        fetch: Callable[[str], bytes] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._fetch = fetch or _fetch
        self._clock = clock
        self._keys: dict[str, PyJWK] = {}
        self._fetched_at = self._tried_at = float("-inf")
        self._known: OrderedDict[bytes, tuple[Identity, float, float]] = OrderedDict()

    def known(self, token: str) -> Identity | None:
        """Return whom a token names that was checked a moment ago and has not expired since."""
        found = self._known.get(hashlib.sha256(token.encode("utf-8", "replace")).digest())
        if found is None or self._clock() > found[1] or time.time() > found[2]:
            return None
        return found[0]

    def check(self, token: str) -> Identity:
        """Return whom a token names. Raises: AccessDenied, Busy when the issuer's keys cannot be had."""
        import jwt

        settings = self._settings
        try:
            if len(token) > MAX_TOKEN_CHARS:
                raise jwt.InvalidTokenError("it is too long")
            claims = jwt.decode(
                token,
                self._key(jwt.get_unverified_header(token)),
                algorithms=list(settings.algorithms),
                issuer=settings.issuer,
                audience=settings.audience,
                leeway=settings.leeway_s,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as problem:
            raise AccessDenied(f"The token is not valid: {problem}", hint=f"a token of {settings.issuer}") from None
        identity = self._identity(claims)
        now = self._clock()
        self._known[hashlib.sha256(token.encode()).digest()] = identity, now + CACHED_S, float(claims["exp"])
        while len(self._known) > MAX_CACHED:
            self._known.popitem(last=False)
        return identity

    def _key(self, header: Mapping[str, Any]) -> PyJWK:
        """Return the key that a token says it was signed with. Raises: jwt.PyJWTError, Busy."""
        import jwt

        now, name = self._clock(), header.get("kid")
        if now - self._fetched_at > self._settings.refresh_s or name not in self._keys:
            self._refresh(now)
        if not self._keys:
            raise Busy("The token issuer's keys cannot be had at present", retry_after_s=FETCH_AGAIN_S)
        found = self._keys.get(name) if isinstance(name, str) else None
        if found is None and name is None and len(self._keys) == 1:
            [found] = self._keys.values()
        if found is None:
            raise jwt.InvalidKeyError("it names no key of the issuer")
        return found

    def _refresh(self, now: float) -> None:
        """Fetch the keys. Those that are known stay in force while the issuer does not answer."""
        import jwt

        if now - self._tried_at < FETCH_AGAIN_S:
            return
        self._tried_at = now
        try:
            told = msgspec.json.decode(self._fetch(self._settings.jwks), type=dict[str, list[dict[str, Any]]])
            keys = jwt.PyJWKSet.from_dict(told).keys
        except (OSError, ValueError, msgspec.DecodeError, jwt.PyJWTError) as problem:
            log.warning("cannot take the keys at %s: %s", self._settings.jwks, problem)
            return
        usable = [key for key in keys if key.key_type in ("RSA", "EC", "OKP") and key.public_key_use in (None, "sig")]
        self._keys = {key.key_id or f"#{index}": key for index, key in enumerate(usable)}
        self._fetched_at = now

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        names, settings = self._settings.claims, self._settings
        told, models = _words(claims, names.scopes), _words(claims, names.models)
        if models == []:  # to a policy, no models means every model
            raise AccessDenied("The token is not valid: it allows no model")
        tier = _text(claims, names.tier)
        limits = settings.tiers.get(tier) or settings.tiers.get("default") or TierLimits()
        subject = str(claims["sub"])[:256]
        try:
            policy = policy_of(
                {
                    **msgspec.structs.asdict(limits),
                    "tenant": _text(claims, names.tenant),
                    "tier": tier,
                    "models": tuple(models or ()),
                }
            )
        except InvalidInput as problem:
            raise AccessDenied(f"The token is not valid: {problem.message}") from None
        scopes = frozenset(told or ()) & {*SCOPES}
        # An identity provider's own words (openid, email …) grant nothing, and are no reason to refuse.
        return Identity(f"jwt:{subject}", subject, scopes or frozenset(settings.scopes), policy)


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    if name in claims:
        return claims[name]
    value: Any = claims
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _text(claims: Mapping[str, Any], name: str) -> str:
    """Return a claim that must be a text if it is there. Raises: AccessDenied."""
    value = _claim(claims, name)
    if value is not None and not isinstance(value, str):
        raise AccessDenied(f"The token is not valid: its claim {name!r} must be a text")
    return value or ""


def _words(claims: Mapping[str, Any], name: str) -> list[str] | None:
    """Return a claim that must be words or a list of them, or None without it. Raises: AccessDenied."""
    value = _claim(claims, name)
    words = value.split() if isinstance(value, str) else value
    if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise AccessDenied(f"The token is not valid: its claim {name!r} must be a list of texts")
    return words


def _fetch(source: str) -> bytes:
    """Return the JSON Web Key Set at a file or https URL. Raises: OSError, ValueError."""
    data = _download(source) if source.startswith("https://") else Path(source).read_bytes()
    if len(data) > MAX_JWKS_BYTES:
        raise ValueError(f"it is larger than {MAX_JWKS_BYTES} bytes")
    return data


def _download(url: str) -> bytes:
    import urllib.request

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        """An issuer that points elsewhere is not followed: its keys decide who comes in."""

        def redirect_request(self, *_: Any) -> None:
            return None

    with urllib.request.build_opener(NoRedirect).open(url, timeout=FETCH_TIMEOUT_S) as answer:
        data: bytes = answer.read(MAX_JWKS_BYTES + 1)
        return data
