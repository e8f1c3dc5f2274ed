"""`jwt.yaml`, which a person writes beside the inventory and `rbee apply` takes to the queen's host."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

EXPLAINED = "docs/keys.md, Tokens of an identity provider"
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Limit = Annotated[int, Meta(ge=0, le=2**53)]
"""0 means: no limit."""


class TierLimits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits of one tier, as those of a key."""

    priority: Literal["interactive", "normal", "batch"] = "interactive"
    requests_per_minute: Limit = 0
    tokens_per_minute: Limit = 0
    concurrency: Limit = 0
    requests_per_day: Limit = 0
    tokens_per_day: Limit = 0
    requests_per_month: Limit = 0
    tokens_per_month: Limit = 0


class Claims(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which claim holds what. A name with dots leads into nested objects."""

    tenant: str = "tenant"
    tier: str = "tier"
    models: str = "models"
    scopes: str = "scope"


class JwtSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The issuer of tokens. `scopes` are what a token may do that claims none; admin is only ever given by a claim.

    `jwks` are the issuer's public keys: an https URL, or a file whose path counts from the folder of `jwt.yaml`.
    """

    issuer: Annotated[str, Meta(min_length=1)]
    audience: Annotated[str, Meta(min_length=1)]
    jwks: Annotated[str, Meta(min_length=1)]
    algorithms: tuple[Literal["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"], ...] = ("RS256", "EdDSA")
    leeway_s: Annotated[float, Meta(ge=0, le=300)] = 60.0
    refresh_s: Seconds = 300.0
    claims: Claims = Claims()
    scopes: tuple[Literal["inference", "metrics"], ...] = ("inference",)
    tiers: dict[str, TierLimits] = {}
    """What each tier may use; that named `default` stands for every other."""
