"""Who is calling, and whether they may.

On the loopback address no key is needed, except for the control of the fleet; from anywhere else one always is.
A browser's page from another origin counts as somewhere else, also when the browser runs on this machine.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar
from urllib.parse import urlsplit

from gevent import get_hub

from rbee.errors import Forbidden, RbeeError
from rbee.queen.jwt_tokens import JwtTokens
from rbee.queen.keys import ADMIN, INFERENCE, METRICS, PREFIX, Key, KeyStore, no_key
from rbee.queen.policy import NO_LIMITS, Policy
from rbee.queen.settings import Settings

T = TypeVar("T")

PROXY_HEADERS = ("HTTP_FORWARDED", "HTTP_X_FORWARDED_FOR", "HTTP_X_REAL_IP", "HTTP_VIA")
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1", ""})


@dataclass(frozen=True)
class Caller:
    """Who sent a request, a key, a token's subject or the person at this machine, and what is allowed."""

    id: str
    name: str
    scopes: frozenset[str]
    policy: Policy = NO_LIMITS

    @property
    def tenant(self) -> str:
        """Return whose jobs these are; empty for the operator's own."""
        return self.policy.tenant


LOCAL = Caller("local", "local", frozenset({INFERENCE}))
OPERATOR = Caller("operator", "operator", frozenset({INFERENCE, ADMIN}))
HIVE = Caller("hive", "hive", frozenset({"hive"}))


class Access:
    """Turns a request into a caller, or refuses it."""

    def __init__(self, settings: Settings, keys: KeyStore, tokens: JwtTokens | None = None) -> None:
        self._settings = settings
        self._keys = keys
        self._tokens = tokens
        self._callers: dict[str, tuple[Key | None, Caller]] = {}
        self._own = [
            (token.encode(), caller)
            for token, caller in ((settings.admin_token, OPERATOR), (settings.hive_token, HIVE))
            if token
        ]

    def caller(self, environ: Mapping[str, str]) -> Caller:
        """Return who may use the models. Raises: AccessDenied, Forbidden."""
        caller = self.anyone(environ)
        if INFERENCE not in caller.scopes:
            raise Forbidden("This API key may not use the models", hint="rbee key set ID --scope inference")
        return caller

    def reader(self, environ: Mapping[str, str]) -> Caller:
        """Return who may read the metrics: a tenant its own, anyone else all. Raises: AccessDenied, Forbidden."""
        caller = self.anyone(environ)
        # Whoever holds a key without a tenant is the operator's own; an issuer's tokens must be told apart.
        if caller.id.startswith("jwt:") and not caller.tenant and not caller.scopes & {METRICS, ADMIN}:
            raise Forbidden("This token may not read the metrics", hint="a token with the scope metrics, or a tenant")
        return caller

    def anyone(self, environ: Mapping[str, str]) -> Caller:
        """Return who calls, whatever that allows. Raises: AccessDenied, Forbidden."""
        secret = _secret(environ)
        if secret.startswith(PREFIX):
            return self._by_key(secret)
        known = self._known(secret)
        if known:
            return known
        if self._tokens is not None and _is_token(secret):
            return self._by_token(secret)
        if self._settings.require_key:
            return self._by_key(secret)
        local = _is_local(environ)
        if secret and not local:
            return self._by_key(secret)
        if local:
            return LOCAL
        if _is_loopback(environ) and not _is_proxied(environ):
            raise Forbidden(
                "This request came from this machine, but for another host's name or from a page of another origin",
                hint="http://localhost, or an API key from: rbee key create NAME",
            )
        raise no_key()

    def operator(self, environ: Mapping[str, str]) -> Caller:
        """Return who may control the fleet. Raises: AccessDenied, Forbidden."""
        secret = _secret(environ)
        known = self._known(secret)
        if known is OPERATOR:
            return OPERATOR
        caller = self._by_token(secret) if self._tokens is not None and _is_token(secret) else self._by_key(secret)
        if ADMIN not in caller.scopes:
            raise Forbidden("This API key may not control the fleet", hint="rbee key create NAME --admin")
        return caller

    def hive(self, environ: Mapping[str, str]) -> Caller:
        """Return a hive that reports. Raises: AccessDenied."""
        if self._known(_secret(environ)) is not HIVE:
            raise no_key()
        return HIVE

    def _known(self, secret: str) -> Caller | None:
        given = secret.encode("utf-8", "replace")
        return next((caller for token, caller in self._own if hmac.compare_digest(given, token)), None)

    def _by_token(self, secret: str) -> Caller:
        assert self._tokens is not None
        found = self._tokens.known(secret)
        if found is None:
            # A signature takes a while to check, and the issuer's keys may have to be fetched.
            found = _off_hub(self._tokens.check, secret)
        return Caller(found.id, found.name, found.scopes, found.policy)

    def _by_key(self, secret: str) -> Caller:
        if not secret:
            raise no_key()
        if self._keys.stale():
            # Another program has written the keys. SQLite may wait for it, which must not hold up every stream.
            _off_hub(self._keys.reload)
        key = self._keys.check(secret)
        known, caller = self._callers.get(key.id, (None, LOCAL))
        if known is not key:
            caller = Caller(key.id, key.name, key.scopes, key.policy)
            self._callers[key.id] = (key, caller)
        return caller


def _off_hub(function: Callable[..., T], *args: object) -> T:
    """Call a function on a thread. What it refuses crosses as a value: gevent prints what a thread raises."""

    def call() -> T | RbeeError:
        try:
            return function(*args)
        except RbeeError as problem:
            return problem

    result: T | RbeeError = get_hub().threadpool.apply(call)
    if isinstance(result, RbeeError):
        raise result
    return result


def _is_token(secret: str) -> bool:
    """Return True for what has the form of a signed JSON Web Token (RFC 7515, 7.1): its header is an object."""
    return secret.startswith("ey") and secret.count(".") == 2


def _secret(environ: Mapping[str, str]) -> str:
    """Read the key where OpenAI's clients put it, or where Anthropic's do."""
    scheme, _, value = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    return environ.get("HTTP_X_API_KEY", "").strip()


def _is_local(environ: Mapping[str, str]) -> bool:
    if not _is_loopback(environ) or _is_proxied(environ):
        return False
    # A page whose name was re-bound to 127.0.0.1 gives itself away by the Host it asks for.
    return _host_of("//" + environ.get("HTTP_HOST", "")) in LOCAL_NAMES and _origin_is_local(environ)


def _is_proxied(environ: Mapping[str, str]) -> bool:
    return any(name in environ for name in PROXY_HEADERS)


def _is_loopback(environ: Mapping[str, str]) -> bool:
    return _loops_back(environ.get("REMOTE_ADDR", ""))


@lru_cache(maxsize=1024)
def _loops_back(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _origin_is_local(environ: Mapping[str, str]) -> bool:
    # Browsers tell of no Origin where a page only embeds something, but whose page it is (W3C Fetch Metadata).
    if environ.get("HTTP_SEC_FETCH_SITE") == "cross-site":
        return False
    origin = environ.get("HTTP_ORIGIN")
    return origin is None or (origin != "null" and _host_of(origin) in LOCAL_NAMES)


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return "invalid"
