"""Jobs, files and batches as they cross the wire. Files and batches are OpenAI's (API reference, 2026-10)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from rbee.wire.errors import ErrorDetail
from rbee.wire.openai import ModelName, PriorityWord, Stop, Temperature, TokenCount

Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
Priority = Literal["interactive", "normal", "batch"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "normal", "batch")
"""The order in which waiting jobs are run."""

JobEndpoint = Literal[
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
]
BatchEndpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/rerank"]


class JobStatus(StrEnum):
    """What became of a job. `interrupted`: its stream had begun when the queen ended; it is not run again."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"

    @property
    def final(self) -> bool:
        """Return True for a state that is never left."""
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


class CreateJob(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/jobs`: a request to one of the inference endpoints, to be run without a client that waits."""

    endpoint: JobEndpoint
    body: msgspec.Raw
    metadata: Metadata = {}
    priority: PriorityWord = "normal"


class JobUsage(Struct, frozen=True, kw_only=True):
    """The tokens of a job, as the engine reported them; `estimated` by the queen where it did not."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False


class JobCreated(Struct, frozen=True, kw_only=True):
    """The answer to `POST /v1/jobs`."""

    job_id: str
    status: JobStatus
    object: Literal["job"] = "job"


class JobView(Struct, frozen=True, kw_only=True):
    """One job. Times are seconds since the epoch, 0 for what has not happened.

    `kind` is request (a client waited for it), job or batch. `response` is the answer as the engine gave it, for jobs
    of `POST /v1/jobs` that did not stream, until its retention ends; lists leave it out.
    """

    id: str
    status: JobStatus
    kind: Literal["request", "job", "batch"]
    endpoint: str
    model: str
    priority: str = "interactive"
    key: str = ""
    worker: str = ""
    created_at: float
    started_at: float = 0.0
    ended_at: float = 0.0
    usage: JobUsage = JobUsage()
    metadata: dict[str, str] = {}
    error: ErrorDetail | None = None
    response: msgspec.Raw | UnsetType = UNSET
    object: Literal["job"] = "job"


class JobList(Struct, frozen=True, kw_only=True):
    """The body of `GET /v1/jobs`, the newest first; `last_id` is the next page's `after`."""

    data: list[JobView]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None
    object: Literal["list"] = "list"


class TaskRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v2/tasks`: one prompt, answered as the endpoint of its capability answers, streamed by default."""

    prompt: Annotated[str, Meta(min_length=1)]
    model: ModelName
    capability: Literal["text-gen", "chat", "completion", "embedding", "embeddings"] = "text-gen"
    system: str | None = None
    max_tokens: TokenCount | None = None
    temperature: Temperature | None = None
    seed: int | None = None
    stop: Stop | None = None
    priority: PriorityWord | None = None
    stream: bool = True

    def request(self) -> tuple[str, bytes]:
        """Return the endpoint and the body that this task stands for."""
        if self.capability in ("embedding", "embeddings"):
            return "/v1/embeddings", msgspec.json.encode({"model": self.model, "input": self.prompt})
        values = {name: getattr(self, name) for name in ("max_tokens", "temperature", "seed", "stop")}
        body: dict[str, object] = {"model": self.model, **{k: v for k, v in values.items() if v is not None}}
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.capability == "completion":
            return "/v1/completions", msgspec.json.encode(body | {"prompt": self.prompt})
        system = [{"role": "system", "content": self.system}] if self.system else []
        body["messages"] = [*system, {"role": "user", "content": self.prompt}]
        return "/v1/chat/completions", msgspec.json.encode(body)


class FileObject(Struct, frozen=True, kw_only=True):
    """A stored file, as OpenAI shows it."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    object: Literal["file"] = "file"


class FileList(Struct, frozen=True, kw_only=True):
    """The body of `GET /v1/files`."""

    data: list[FileObject]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None
    object: Literal["list"] = "list"


class FileDeleted(Struct, frozen=True, kw_only=True):
    """The answer to `DELETE /v1/files/{id}`."""

    id: str
    deleted: bool = True
    object: Literal["file"] = "file"


class CreateBatch(Struct, kw_only=True):
    """`POST /v1/batches`."""

    input_file_id: str
    endpoint: BatchEndpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None


class BatchLine(Struct, kw_only=True):
    """One line of a batch's input file."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


class BatchProblem(Struct, frozen=True, kw_only=True):
    """What is wrong with an input file; lines count from 1."""

    message: str
    code: str = "invalid_request"
    line: int | None = None
    param: str | None = None


class BatchProblems(Struct, frozen=True, kw_only=True):
    """The first hundred mistakes of an input file."""

    data: list[BatchProblem]
    object: Literal["list"] = "list"


class RequestCounts(Struct, kw_only=True):
    """How far a batch is."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(Struct, kw_only=True):
    """A batch, as OpenAI shows it. Times are whole seconds since the epoch."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str = "24h"
    status: str = "validating"
    created_at: int
    expires_at: int
    errors: BatchProblems | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None
    object: Literal["batch"] = "batch"


class BatchList(Struct, frozen=True, kw_only=True):
    """The body of `GET /v1/batches`, the newest first."""

    data: list[Batch]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None
    object: Literal["list"] = "list"
