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
MEANT: Mapping[str, Priority] = {
    **{priority: priority for priority in PRIORITIES},
    "high": "interactive",
    "low": "batch",
}
"""What clients may say, and the priority that is meant by it."""

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
        return bool(
            self.requests_per_minute
            or self.tokens_per_minute
            or self.concurrency
            or self.requests_per_day
            or self.tokens_per_day
            or self.requests_per_month
            or self.tokens_per_month
        )

    def urgency(self, wanted: Priority | None) -> Priority:
        """Return the priority of a job that asks for `wanted`: never a more urgent one than this identity's own."""
        if wanted is None:
            return self.priority
        return max(wanted, self.priority, key=PRIORITIES.index)

    def heard(self, said: str) -> tuple[Priority, str]:
        """Return the priority of a job whose client says one of `MEANT`, and the word for it that scripts see.

        That is the client's own word, unless it asks for more than this identity may have.
        """
        meant = MEANT[said]
        given = self.urgency(meant)
        return given, said if given == meant else given


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
        field = where.rstrip("`") or "a field"
        if "regex" in what:
            hint = "64 letters, digits, or . _ : - at most, and a letter or digit first"
            raise InvalidInput(f"What a key allows: {fields.get(field)!r} is no {field}", hint=hint) from None
        raise InvalidInput(f"What a key allows: {field}: {what}") from None
