"""Who is calling, and whether they may.

On the loopback address no key is needed, except for the control of the fleet; from anywhere else one always is.
A browser's page from another origin counts as somewhere else, also when the browser runs on this machine.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from rbee.errors import AccessDenied, Forbidden
from rbee.queen.keys import ADMIN, INFERENCE, PREFIX, KeyStore
from rbee.queen.settings import Settings

PROXY_HEADERS = ("HTTP_FORWARDED", "HTTP_X_FORWARDED_FOR", "HTTP_X_REAL_IP", "HTTP_VIA")
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1", ""})


@dataclass(frozen=True)
class Caller:
    """Who sent a request: a key's id and name, or the person at this machine."""

    id: str
    name: str
    scopes: frozenset[str]


LOCAL = Caller("local", "local", frozenset({INFERENCE}))
OPERATOR = Caller("operator", "operator", frozenset({INFERENCE, ADMIN}))
HIVE = Caller("hive", "hive", frozenset({"hive"}))


class Access:
    """Turns a request into a caller, or refuses it."""

    def __init__(self, settings: Settings, keys: KeyStore) -> None:
        self._settings = settings
        self._keys = keys

    def caller(self, environ: Mapping[str, str]) -> Caller:
        """Return who may use the models. Raises: AccessDenied, Forbidden."""
        secret = _secret(environ)
        known = self._known(secret)
        if known:
            return known
        local = _is_local(environ)
        if secret.startswith(PREFIX) or (secret and not local) or self._settings.require_key:
            return self._by_key(secret)
        if local:
            return LOCAL
        if _is_loopback(environ) and environ.get("HTTP_ORIGIN"):
            raise Forbidden("A page of another origin may not use this machine's models", hint="an API key")
        raise AccessDenied(
            "You didn't provide an API key, and this request does not come from this machine",
            hint="Authorization: Bearer KEY, with a KEY from: rbee key create NAME",
        )

    def operator(self, environ: Mapping[str, str]) -> Caller:
        """Return who may control the fleet. Raises: AccessDenied, Forbidden."""
        secret = _secret(environ)
        known = self._known(secret)
        if known is OPERATOR:
            return OPERATOR
        caller = self._by_key(secret)
        if ADMIN not in caller.scopes:
            raise Forbidden("This API key may not control the fleet", hint="rbee key create NAME --admin")
        return caller

    def hive(self, environ: Mapping[str, str]) -> Caller:
        """Return a hive that reports. Raises: AccessDenied."""
        if self._known(_secret(environ)) is not HIVE:
            raise AccessDenied("Only a hive with this queen's hive token may report here")
        return HIVE

    def _known(self, secret: str) -> Caller | None:
        given = secret.encode("utf-8", "replace")
        if self._settings.admin_token and hmac.compare_digest(given, self._settings.admin_token.encode()):
            return OPERATOR
        if self._settings.hive_token and hmac.compare_digest(given, self._settings.hive_token.encode()):
            return HIVE
        return None

    def _by_key(self, secret: str) -> Caller:
        if not secret:
            raise AccessDenied("You didn't provide an API key", hint="Authorization: Bearer KEY")
        key = self._keys.check(secret)
        return Caller(key.id, key.name, key.scopes)


def _secret(environ: Mapping[str, str]) -> str:
    """Read the key where OpenAI's clients put it, or where Anthropic's do."""
    scheme, _, value = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    return environ.get("HTTP_X_API_KEY", "").strip()


def _is_local(environ: Mapping[str, str]) -> bool:
    if not _is_loopback(environ) or any(name in environ for name in PROXY_HEADERS):
        return False
    # A page whose name was re-bound to 127.0.0.1 gives itself away by the Host it asks for.
    return _host_of("//" + environ.get("HTTP_HOST", "")) in LOCAL_NAMES and _origin_is_local(environ)


def _is_loopback(environ: Mapping[str, str]) -> bool:
    try:
        return ipaddress.ip_address(environ.get("REMOTE_ADDR", "")).is_loopback
    except ValueError:
        return False


def _origin_is_local(environ: Mapping[str, str]) -> bool:
    origin = environ.get("HTTP_ORIGIN")
    return origin is None or (origin != "null" and _host_of(origin) in LOCAL_NAMES)


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return "invalid"
