"""Every error that rbee raises on purpose, in families named by what the caller will do.

RbeeError
├── InvalidInput            change the request or the command, then send it again
│   ├── InvalidRequest      a field of an API request is wrong (names the field)
│   ├── ContextExceeded     the prompt does not fit the model's context
│   ├── PayloadTooLarge     the body is larger than this endpoint takes
│   ├── UnknownModel        no machine has this model
│   ├── NotFound            no such thing under this address
│   ├── MethodNotAllowed    the address exists, the method does not
│   ├── NotSupported        the model, engine or endpoint cannot do this
│   │   └── PolicyDenied    every machine that could is in another region, or another tenant's
│   ├── InvalidModelFile    the file is no model, is damaged, or is hostile
│   ├── KeyReused           an Idempotency-Key came again with another request
│   ├── OldReport           a hive reports of an earlier run of it than is known
│   ├── RequestTimeout      the request's body did not arrive in time
│   ├── InvalidScript       the routing script does not compile or has no entry function
│   ├── InvalidInventory    inventory files have mistakes: all of them, each with its file and line
│   └── RevisionRefused     a commit is not signed, rewrites its branch, or is not there
├── AccessDenied            bring a key, or another one
│   └── Forbidden           this key, or this origin, may not do that
├── Busy                    wait, then send the same request again
│   ├── Refused             the routing script turned the job away
│   ├── QueueFull           too many jobs wait for this model
│   ├── RateLimited         this key has used its rate, or has too many jobs at once
│   │   └── QuotaExhausted  its budget of the day or month
│   ├── StorageProblem      the queen cannot record what she does: the disk is full, or the records are locked
│   └── ShuttingDown        this program is about to end
├── Lost                    a worker or hive went away while it was needed
│   ├── WorkerLost          in the middle of an answer
│   ├── Unreachable         nothing listens at its address
│   └── TimedOut            it did not answer within its limit
│       └── DeadlineExceeded  the time that the client itself allowed is over
├── SetupProblem            put the machine or its configuration right
│   ├── PortInUse
│   ├── PluginProblem
│   └── LoadFailed          an engine could not load a model
└── HostProblem             look at the host that it names; the other hosts went on
    ├── HostUnreachable     no connection, or it was lost: the same apply later converges it
    ├── HostRefused         ssh, its host key, sudo or python there must be put right first
    ├── HostBusy            another apply holds it
    └── HostFailed          what was done there did not succeed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple


class RbeeError(Exception):
    """Tell what went wrong, where, and what to try.

    `status`, `type` and `code` are the HTTP status and the two words of an OpenAI error body;
    `exit_code` is what the command line ends with.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "internal_error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param

    def __str__(self) -> str:
        return f"{self.message}. Try: {self.hint}" if self.hint else self.message


class InvalidInput(RbeeError):
    """Something the caller sent is wrong; the same request will fail again."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"
    exit_code = 2


class InvalidRequest(InvalidInput):
    """A field of an API request has a wrong type or value; `param` names it."""

    code = "invalid_value"


class ContextExceeded(InvalidInput):
    """A prompt is longer than the model's context."""

    code = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, context_tokens: int) -> None:
        super().__init__(
            f"This model's context is {context_tokens} tokens, but the request needs {prompt_tokens} tokens",
            hint="a shorter prompt, or a worker with a larger ctx",
            param="messages",
        )
        self.prompt_tokens = prompt_tokens
        self.context_tokens = context_tokens


class PayloadTooLarge(InvalidInput):
    """A request body is over the limit."""

    status = 413
    code = "payload_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request body is over the limit of {limit_bytes} bytes")
        self.limit_bytes = limit_bytes


class KeyReused(InvalidInput):
    """An Idempotency-Key was used for another request before."""

    status = 409
    code = "idempotency_key_reused"


class OldReport(InvalidInput):
    """A hive's report is of an earlier run of it than the one that is known."""

    status = 409
    code = "old_report"


class RequestTimeout(InvalidInput):
    """A request's body did not arrive in time."""

    status = 408
    code = "request_timeout"


class UnknownModel(InvalidInput):
    """No machine has a model of this name."""

    status = 404
    code = "model_not_found"
    exit_code = 4

    def __init__(self, model: str, near: Sequence[str] = (), installed: Sequence[str] = ()) -> None:
        shown = model if len(model) <= 120 else model[:117] + "..."
        parts = [f"The model {shown!r} is not installed on any machine."]
        if near:
            parts.append("Did you mean " + " or ".join(repr(name) for name in near) + "?")
        parts.append("Installed: " + (", ".join(installed) if installed else "none"))
        super().__init__(" ".join(parts), hint="rbee model add FILE", param="model")
        self.model = model


class NotFound(InvalidInput):
    """Nothing lives under this address or name."""

    status = 404
    code = "not_found"
    exit_code = 4


class MethodNotAllowed(InvalidInput):
    """An address exists but does not take this method; `allowed` are those it takes."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, method: str, path: str, allowed: Sequence[str]) -> None:
        super().__init__(f"{method} is not allowed on {path}; it takes {', '.join(allowed)}")
        self.allowed = tuple(allowed)


class NotSupported(InvalidInput):
    """A model, an engine or an endpoint cannot do what was asked."""

    code = "not_supported"


class PolicyDenied(NotSupported):
    """Every machine that could run a job may not, for `reason`: region or tenant."""

    def __init__(self, message: str, *, reason: str, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message, hint=hint, param=param)
        self.reason = reason


class InvalidModelFile(InvalidInput):
    """A model file is none, is damaged, or claims what its bytes do not hold."""

    code = "invalid_model_file"


class InvalidScript(InvalidInput):
    """A routing script does not compile or has no entry function."""

    code = "invalid_script"


class Mistake(NamedTuple):
    """One thing that is wrong in a file; line 0 means the file or folder as a whole."""

    file: str
    line: int
    message: str
    hint: str = ""

    @property
    def at(self) -> str:
        """The place, as editors and compilers write it."""
        return f"{self.file}:{self.line}" if self.line else self.file

    def __str__(self) -> str:
        return f"{self.at}: {self.message}" + (f"\n  try: {self.hint}" if self.hint else "")


class InvalidInventory(InvalidInput):
    """Inventory files have mistakes; `mistakes` holds all of them, in the order of the files and lines.

    `warnings` are what else is doubtful there: often the reason for a mistake.
    """

    code = "invalid_inventory"

    def __init__(self, mistakes: Sequence[Mistake], warnings: Sequence[Mistake] = ()) -> None:
        self.mistakes = tuple(mistakes)
        self.warnings = tuple(warnings)
        if len(mistakes) == 1:
            super().__init__(f"{mistakes[0].at}: {mistakes[0].message}", hint=mistakes[0].hint or None)
        else:
            lines = "\n".join(str(mistake) for mistake in mistakes)
            super().__init__(f"{len(mistakes)} mistakes in the inventory:\n{lines}")


class RevisionRefused(InvalidInput):
    """A commit is not let in: it is not signed, rewrites its branch, or is not there."""

    code = "revision_refused"


class AccessDenied(RbeeError):
    """A request has no key, a wrong one, or one without the needed scope."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    exit_code = 5


class Forbidden(AccessDenied):
    """A valid key, or the caller's origin, may not do this."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class Busy(RbeeError):
    """There is no room at the moment; `retry_after_s` says when to ask again."""

    status = 503
    type = "server_error"
    code = "busy"
    exit_code = 6

    def __init__(self, message: str, *, retry_after_s: float = 1.0, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class Refused(Busy):
    """The routing script turned a job away."""

    status = 429
    type = "rate_limit_error"
    code = "refused_by_script"


class QueueFull(Busy):
    """Too many jobs wait for one model already."""

    code = "queue_full"


class RateLimited(Busy):
    """A key has used the requests or tokens of its minute, or has as many jobs at once as it may.

    `limit` names what is used up, as a key's policy calls it.
    """

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(
        self, message: str, *, limit: str = "jobs_waiting", retry_after_s: float = 1.0, hint: str | None = None
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s, hint=hint)
        self.limit = limit


class QuotaExhausted(RateLimited):
    """A key has used its budget of the day or month."""

    type = "insufficient_quota"
    code = "insufficient_quota"


class StorageProblem(Busy):
    """The queen's records cannot be written; nothing is accepted that could not be accounted for."""

    code = "storage_unavailable"


class ShuttingDown(Busy):
    """This program is about to end."""

    code = "shutting_down"


class Lost(RbeeError):
    """Something that was needed went away; the same request may work when it is back."""

    status = 502
    code = "upstream_lost"
    exit_code = 3


class WorkerLost(Lost):
    """A worker died or closed the connection before the answer was whole."""

    code = "worker_lost"


class Unreachable(Lost):
    """A queen, hive or worker does not answer at its address."""

    code = "unreachable"


class TimedOut(Lost):
    """An answer did not come within its limit."""

    status = 504
    code = "timeout"


class DeadlineExceeded(TimedOut):
    """The time that the client allowed with X-Request-Timeout is over."""

    code = "deadline_exceeded"


class SetupProblem(RbeeError):
    """A machine or its configuration has to be put right first."""

    code = "setup_problem"


class PortInUse(SetupProblem):
    """Another program listens on the port."""

    code = "port_in_use"

    def __init__(self, host: str, port: int) -> None:
        super().__init__(
            f"Port {port} on {host} is in use by another program",
            hint=f"another --port, or find it with: ss -ltnp 'sport = :{port}'",
        )


class PluginProblem(SetupProblem):
    """A worker plugin cannot be imported, or is not installed."""

    code = "plugin_problem"


class LoadFailed(SetupProblem):
    """An engine could not load a model."""

    status = 503
    code = "load_failed"


class HostProblem(RbeeError):
    """Something is the matter with one host of the inventory, whose name is `host`."""

    code = "host_problem"

    def __init__(self, host: str, what: str, *, hint: str | None = None) -> None:
        super().__init__(f"{host}: {what}", hint=hint)
        self.host = host
        self.what = what


class HostUnreachable(HostProblem):
    """A host cannot be connected to, or the connection was lost."""

    code = "host_unreachable"
    exit_code = 3


class HostRefused(HostProblem):
    """A host was reached, but cannot be worked on as the inventory says."""

    code = "host_refused"


class HostBusy(HostProblem):
    """Another apply is at work on the host; `holder` says whose and since when."""

    code = "host_busy"
    exit_code = 6

    def __init__(self, host: str, holder: str) -> None:
        super().__init__(host, f"another apply is at work on it ({holder or 'it does not say whose'})", hint="later")
        self.holder = holder


class HostFailed(HostProblem):
    """What was to be done on a host did not succeed; `details` is the agent's own answer."""

    code = "host_failed"

    def __init__(self, host: str, what: str, *, hint: str | None = None, details: Mapping[str, Any] = {}) -> None:
        super().__init__(host, what, hint=hint)
        self.details = details
