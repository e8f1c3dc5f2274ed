"""The body of every error response, and the way back from a body to an error."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from rbee.errors import RbeeError


class ErrorDetail(Struct, frozen=True, kw_only=True):
    """What OpenAI's clients read of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Struct, frozen=True, kw_only=True):
    """An error response, as OpenAI's API has it.

    `type` is "error" on Anthropic's routes, whose clients look for it there, and absent elsewhere.
    """

    error: ErrorDetail
    type: str | msgspec.UnsetType = msgspec.UNSET


def encode_error(error: RbeeError, *, anthropic: bool = False) -> bytes:
    """Encode an error as a JSON body that the clients of both dialects understand."""
    detail = ErrorDetail(
        message=str(error),
        type=(ANTHROPIC_TYPES.get(error.status, "api_error") if anthropic else error.type),
        param=error.param,
        code=error.code,
    )
    return msgspec.json.encode(ErrorBody(error=detail, type="error" if anthropic else msgspec.UNSET))


def detail_of(error: RbeeError) -> ErrorDetail:
    """Return what is told of an error, as OpenAI's API has it."""
    return ErrorDetail(message=str(error), type=error.type, param=error.param, code=error.code)


def encode_detail(detail: ErrorDetail) -> str:
    """Return an error as JSON text for a record."""
    return msgspec.json.encode(detail).decode()


ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Anthropic's words for statuses (docs.anthropic.com, "Errors")."""


class UpstreamError(RbeeError):
    """An error that an engine answered, with its own status and words."""

    def __init__(self, status: int, detail: ErrorDetail) -> None:
        super().__init__(detail.message, param=detail.param)
        self.status = status  # type: ignore[misc]  # one class stands for every status an engine answers
        self.type = detail.type  # type: ignore[misc]
        self.code = detail.code  # type: ignore[misc]


CLIENT_FAULTS = ("Failed to parse", "image input is not supported", "audio input is not supported")
"""How llama.cpp begins the errors that it answers with 500 although the request is what is wrong."""


def decode_error(status: int, body: bytes) -> UpstreamError:
    """Read an engine's error body, whatever its form, into one error.

    llama.cpp gives `code` as a number and names the limits of a prompt in fields of their own;
    others answer `{"detail": …}` or plain text.
    """
    try:
        raw = msgspec.json.decode(body)
    except msgspec.DecodeError:
        raw = body.decode("utf-8", "replace").strip()[:500]
    inner = raw.get("error", raw) if isinstance(raw, dict) else raw
    if not isinstance(inner, dict):
        message = str(inner) or f"The engine answered {status}"
        return UpstreamError(status, ErrorDetail(message=message, type=_type(status)))
    message = str(inner.get("message") or inner.get("detail") or inner)
    if "n_prompt_tokens" in inner and "n_ctx" in inner:
        message = (
            f"This model's context is {inner['n_ctx']} tokens, but the request needs "
            f"{inner['n_prompt_tokens']} tokens. Try: a shorter prompt, or a worker with a larger ctx"
        )
        exceeded = "context_length_exceeded"
        return UpstreamError(
            400, ErrorDetail(message=message, type="invalid_request_error", param="messages", code=exceeded)
        )
    if message.startswith(CLIENT_FAULTS):
        status = 400
    code = inner.get("code")
    param = inner.get("param")
    return UpstreamError(
        status,
        ErrorDetail(
            message=message,
            type=_type(status) if status < 500 else "server_error",
            param=param if isinstance(param, str) else None,
            code=code if isinstance(code, str) else None,
        ),
    )


def _type(status: int) -> str:
    return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
