"""The routing script as it crosses the wire: which one is in force, and why a job went where it went."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from rbee.wire.openai import ModelName

Word = Annotated[str, Meta(max_length=256)]


class SchedulerView(Struct, frozen=True, kw_only=True):
    """`GET /v1/orchestrator/scheduler`. `source` is a path or "built-in default"; `error` is empty when all is well."""

    source: str
    path: str
    text: str
    functions: list[str]
    error: str = ""
    since: float = 0.0
    """When it came into force; Unix time."""
    platform: bool = False
    """Whether only the operator's API may replace it."""


class ReplaceScript(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`PUT /v1/orchestrator/scheduler`: the whole text of a script."""

    text: Annotated[str, Meta(max_length=65_536)]


class ExplainJob(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/orchestrator/scheduler/explain`: a job that is described and not run."""

    model: ModelName
    capability: Word = "chat"
    hive: Word = ""
    region: Word = ""
    tenant: Word = ""
    customer_tier: Word = ""
    priority: Word = "interactive"
    key: Word = "local"
    tags: Annotated[list[Word], Meta(max_length=16)] = []
    metadata: Annotated[dict[Word, Word], Meta(max_length=16)] = {}
    prompt_tokens: Annotated[int, Meta(ge=0, le=2**31)] = 0
    max_tokens: Annotated[int, Meta(ge=0, le=2**31)] = 0
    stream: bool = False


class Explanation(Struct, frozen=True, kw_only=True):
    """How the script in force decided. `chosen` are the ids of workers, the first choice first; none: it waits.

    `line` is the line that decided and `code` its text; `problem` says why the person's own script did not decide.
    """

    chosen: list[str]
    by: str
    function: str
    line: int
    code: str
    lines: list[int]
    task: dict[str, Any]
    workers: list[dict[str, Any]]
    refused: dict[str, str] = {}
    """Places that the script was not shown, and why."""
    problem: str = ""
