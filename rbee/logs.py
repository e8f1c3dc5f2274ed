"""What a log looks like: a line of text or of JSON a record, with the job that is being served.

Whatever a client sends ends as one record: control characters are escaped, and what is too long is cut.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Container, Mapping
from contextvars import ContextVar
from typing import Any, Literal

import msgspec

LogFormat = Literal["text", "json"]

MAX_FIELD_CHARS = 256
"""How much is told of one field that a client wrote."""
MAX_CHARS = 16_384
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_job: ContextVar[str] = ContextVar("rbee_job", default="")
_live: Container[str] = ()


class Lines(str):
    """An argument of a record that may have several lines: text of our own, never a client's."""

    __slots__ = ()


def serving(job_id: str) -> None:
    """Have what this greenlet or thread logs from here on, and those that it starts, name a job."""
    _job.set(job_id)


def follow(live: Container[str]) -> None:
    """Name only jobs that are among the `live` ones: a connection's greenlet outlives the job that it last served."""
    global _live
    _live = live


def current_job() -> str:
    """Return the id of the job that is being served here, or nothing."""
    job = _job.get()
    return job if job in _live else ""


def clip(text: object) -> str:
    """Return what a client wrote as it may stand in a record: one line, at most 256 characters."""
    # Cut before it is escaped as well: a megabyte is not searched.
    return _cut(escaped(str(text)[: MAX_FIELD_CHARS + 1]), MAX_FIELD_CHARS)


def escaped(text: str) -> str:
    """Return a text without control characters, as Python would write them in a literal."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class TextFormatter(logging.Formatter):
    """`TIME LEVEL LOGGER: MESSAGE [JOB]`; further lines of a record are indented, so that none looks like another."""

    def format(self, record: logging.LogRecord) -> str:
        job, message = _job_of(record), _message(record)
        named = f" [{job}]" if job and job not in message else ""
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {message}{named}"
        return "\n    ".join([line, *_exception(self, record).splitlines()])


class JsonFormatter(logging.Formatter):
    """One object a record: time (RFC 3339, UTC), level, logger, message, pid, and job, exception and more if any."""

    def format(self, record: logging.LogRecord) -> str:
        whole, milliseconds = divmod(round(record.created * 1000), 1000)
        told: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{milliseconds:03}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": _plain(record.getMessage()),
            "pid": record.process,
        }
        if job := _job_of(record):
            told["job"] = job
        told |= getattr(record, "fields", {})
        if found := _exception(self, record):
            told["exception"] = _plain(found)
        return msgspec.json.encode(told).decode()


def configure(kind: LogFormat, level: int | str = logging.INFO) -> None:
    """Log to the standard error from here on, in this process and those that it forks."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _job_of(record: logging.LogRecord) -> str:
    return getattr(record, "job", "") or current_job()


def _message(record: logging.LogRecord) -> str:
    """Return a record's message, of which only its own template may have several lines."""
    args = record.args
    if isinstance(args, Mapping):
        args = {name: _shown(value) for name, value in args.items()}
    elif args:
        args = tuple(map(_shown, args))
    text = str(record.msg) % args if args else str(record.msg)
    return _cut("\n    ".join(map(escaped, text.splitlines())), MAX_CHARS)


def _shown(value: object) -> object:
    if isinstance(value, (int, float, Lines)):
        return value
    return escaped(str(value))


def _exception(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if not record.exc_info:
        return ""
    text = formatter.formatException(record.exc_info)
    return "\n".join(map(escaped, _middle_cut(text).splitlines()))


def _plain(text: str) -> str:
    """Return a text that UTF-8 can hold, not too long."""
    return _cut(text, MAX_CHARS).encode("utf-8", "backslashreplace").decode()


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _middle_cut(text: str) -> str:
    """Of a traceback, its beginning and its end tell most."""
    half = MAX_CHARS // 2
    return text if len(text) <= MAX_CHARS else f"{text[:half]}\n…\n{text[-half:]}"
