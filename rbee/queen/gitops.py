"""Show how far the reconciler is, and wake it: for its operator, or for a forge that proves who it is."""

from __future__ import annotations

import hmac
import time
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import falcon
import msgspec

from rbee.errors import AccessDenied, Forbidden, NotFound, SetupProblem
from rbee.queen import body
from rbee.wire.gitops import STATUS_FILE, SYNC_FILE, WEBHOOK_SECRET_FILE, GitopsStatus, GitopsView

if TYPE_CHECKING:
    from rbee.queen.app import Queen

MAX_WEBHOOK_BYTES = 25 * 1024 * 1024
"""GitHub sends no larger ones; they are hashed as they come, and not kept."""
GITHUB, GITLAB = "X-Hub-Signature-256", "X-Gitlab-Token"
MEDIA = ("application/json", "text/html")
PAGE_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'", "Vary": "Accept"}
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="5"><title>rbee: {state}</title>
<style>body{{font:1rem/1.5 system-ui;margin:2rem;color-scheme:light dark}}td,th{{padding:.2rem 1rem .2rem 0;
text-align:left;vertical-align:top}}.failed{{color:#c22}}pre{{white-space:pre-wrap;margin:0;font:inherit}}</style>
<h1 class="{state}">{state}</h1><p>Applied <b>{revision}</b>, wanted <b>{wanted}</b>; looked {age} ago.</p>
<p class="failed">{error}</p><table><tr><th>host<th>state<th>revision<th>attempts<th>error</tr>{rows}</table></html>"""


class Gitops:
    """The reconciler's folder; None where this queen has no reconciler."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def status(self) -> GitopsView | None:
        """Return what the reconciler wrote last; None when there is none. Raises: SetupProblem."""
        if self._folder is None:
            return None
        path = self._folder / STATUS_FILE
        try:
            data = path.read_bytes()
            told = msgspec.json.decode(data, type=GitopsStatus)
        except FileNotFoundError:
            return None
        except OSError as problem:
            raise SetupProblem(f"Cannot read {path} ({problem.strerror})") from None
        except msgspec.DecodeError as problem:
            raise SetupProblem(f"{path} is damaged ({problem})") from None
        age_s = round(max(0.0, time.time() - told.checked_at), 3)
        return GitopsView(**msgspec.structs.asdict(told), age_s=age_s)

    def sync(self) -> None:
        """Have the reconciler look at once. Raises: NotFound, SetupProblem."""
        path = self._required() / SYNC_FILE
        try:
            path.touch()
        except OSError as problem:
            raise SetupProblem(f"Cannot make {path} ({problem.strerror})", hint="its folder's owner") from None

    def secret(self) -> bytes:
        """Return the webhooks' secret. Raises: NotFound, AccessDenied when there is none."""
        path = self._required() / WEBHOOK_SECRET_FILE
        try:
            secret = path.read_bytes().strip()
        except OSError:
            secret = b""
        if len(secret) < 16:
            raise AccessDenied("This queen takes no webhooks", hint=f"a secret of 16 characters or more in {path}")
        return secret

    def _required(self) -> Path:
        if self._folder is None:
            raise NotFound("This queen has no reconciler", hint="rbee gitops, on the queen's machine")
        return self._folder


class Status:
    """How far the reconciler is, as JSON or as a page."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        if self._queen.access.caller(req.env).tenant:
            raise Forbidden("A tenant's key may not see the machines", hint="a key without a tenant")
        status = self._queen.gitops.status()
        if status is None:
            raise NotFound("No reconciler has reported to this queen", hint="rbee gitops, on the queen's machine")
        resp.set_header("Cache-Control", "no-store")
        # Whoever takes anything gets JSON; a browser names text/html.
        if "text/html" in req.accept and req.client_prefers(MEDIA) == "text/html":
            resp.content_type = "text/html; charset=utf-8"
            resp.set_headers(PAGE_HEADERS)
            resp.data = page(status).encode()
        else:
            resp.data = msgspec.json.encode(status)


class Sync:
    """Where a person, or a forge's webhook, asks the reconciler to look at once."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        signature, token = req.get_header(GITHUB), req.get_header(GITLAB)
        if signature is not None:
            _check_signature(req, signature, self._queen.gitops.secret())
        elif token is not None:
            _check_equal(token.encode("utf-8", "replace"), self._queen.gitops.secret())
        else:
            self._queen.access.operator(req.env)
        self._queen.gitops.sync()
        resp.status = 202
        resp.data = msgspec.json.encode({"status": "accepted"})


def page(status: GitopsView) -> str:
    """Return the status as a small page."""
    rows = "".join(
        f'<tr><td>{escape(name)}<td class="{escape(host.state)}">{escape(host.state)}<td>{escape(host.revision[:12])}'
        f"<td>{host.attempts}<td><pre>{escape(host.error)}</pre></tr>"
        for name, host in sorted(status.hosts.items())
    )
    return PAGE.format(
        state=escape(status.state),
        revision=escape(status.revision[:12] or "nothing"),
        wanted=escape(status.wanted[:12] or "nothing"),
        age=f"{status.age_s:.0f} s",
        error=escape(status.error),
        rows=rows,
    )


def _check_signature(req: falcon.Request, signature: str, secret: bytes) -> None:
    """Check GitHub's and Gitea's signature: the hex HMAC-SHA256 (RFC 2104) of the body, after `sha256=`."""
    digest = hmac.new(secret, digestmod="sha256")
    for piece in body.pieces(req, MAX_WEBHOOK_BYTES):
        digest.update(piece)
    _check_equal(signature.encode("utf-8", "replace"), b"sha256=" + digest.hexdigest().encode())


def _check_equal(given: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(given, expected):
        raise AccessDenied("The webhook does not know this queen's secret", hint="the forge's webhook settings")
