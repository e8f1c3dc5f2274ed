"""What the reconciler leaves in its folder for the queen to show: `status.json`.

The folder also holds `sync`, a file that anyone who may write there makes to have the reconciler look at once, and
`webhook.secret`, with which a forge proves that it is the one who asks.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from rbee.wire.fleet import Count

STATUS_FILE = "status.json"
SYNC_FILE = "sync"
WEBHOOK_SECRET_FILE = "webhook.secret"


class GitopsState(StrEnum):
    """Where the reconciler stands."""

    CONVERGED = "converged"
    APPLYING = "applying"
    FAILED = "failed"
    SUSPENDED = "suspended"


class GitopsHost(Struct, frozen=True, kw_only=True):
    """One host: the revision it has, and what keeps it from having the wanted one."""

    revision: str = ""
    state: str = ""
    error: str = ""
    attempts: Count = 0


class GitopsStatus(Struct, frozen=True, kw_only=True):
    """The whole of `status.json`; times are in seconds since the epoch, 0 for never.

    `revision` is the commit that every host has, `wanted` the newest one that was fetched.
    """

    revision: str = ""
    wanted: str = ""
    state: GitopsState = GitopsState.CONVERGED
    error: str = ""
    checked_at: float = 0.0
    applied_at: float = 0.0
    hosts: dict[str, GitopsHost] = {}


class GitopsView(GitopsStatus, frozen=True, kw_only=True):
    """The body of `GET /gitops/status`: the status, and how many seconds ago the reconciler last looked."""

    age_s: float = 0.0
