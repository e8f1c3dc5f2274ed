"""What a key or a token allows: whose it is, what it may use, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from rbee.errors import InvalidInput

Priority = Literal["interactive", "normal", "batch"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "normal", "batch")
"""The most urgent first."""

Label = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$|^$")]
Pattern = Annotated[str, Meta(min_length=1, max_length=256)]
Limit = Annotated[int, Meta(ge=0, le=2**53)]
"""0 means: no limit."""


class Policy(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One identity's standing. Days and months are those of UTC.

    `models` are names or shell patterns (empty: every model). `priority` is what its jobs have when they name none,
    and the most urgent that they may name.
    """

    tenant: Label = ""
    tier: Label = ""
    models: tuple[Pattern, ...] = ()
    priority: Priority = "interactive"
    requests_per_minute: Limit = 0
    tokens_per_minute: Limit = 0
    concurrency: Limit = 0
    requests_per_day: Limit = 0
    tokens_per_day: Limit = 0
    requests_per_month: Limit = 0
    tokens_per_month: Limit = 0

    def allows(self, model: str) -> bool:
        """Return True when a model may be used."""
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)

    @property
    def limited(self) -> bool:
        """Return True when anything has to be counted."""
        return any(getattr(self, name) for name in LIMITS)

    def urgency(self, wanted: Priority | None) -> Priority:
        """Return the priority of a job that asks for `wanted`: never a more urgent one than this identity's own."""
        if wanted is None:
            return self.priority
        return max(wanted, self.priority, key=PRIORITIES.index)


LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "concurrency",
    "requests_per_day",
    "tokens_per_day",
    "requests_per_month",
    "tokens_per_month",
)
NO_LIMITS = Policy()


def policy_of(fields: Mapping[str, object]) -> Policy:
    """Return the policy that these fields stand for. Raises: InvalidInput."""
    try:
        return msgspec.convert(dict(fields), Policy)
    except msgspec.ValidationError as problem:
        what, _, where = str(problem).partition(" - at `$.")
        raise InvalidInput(f"What a key allows: {where.rstrip('`') or 'a field'}: {what}") from None
