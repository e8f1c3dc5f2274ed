"""The kinds of values that rbee's keywords take, each with its word in usage lines."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from rbee.plugin import Capability
from rbee.wire.fleet import NAME_PATTERN

WORKER_NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,39}$"


class Kind(Struct, frozen=True):
    """How one value is read: `read` raises ValueError with what was expected."""

    usage: str
    read: Callable[[str], Any]


def _pattern(expression: str, expected: str) -> Callable[[str], str]:
    compiled = re.compile(expression)

    def read(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError(f"{text!r} is no {expected}")
        return text

    return read


def _whole(low: int, high: int, expected: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        # int() takes signs, spaces, underscores and other scripts' digits.
        if not re.fullmatch("[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"{text!r} is no {expected}")
        return int(text)

    return read


def read_port_or_none(text: str) -> int:
    """Read a port; `none` is 0."""
    return 0 if text.lower() == "none" else int(PORT.read(text))


def read_size(text: str) -> int:
    """Read a size such as 24G, in binary units (IEC 80000-13); the result is in bytes."""
    found = re.fullmatch(r"([0-9]{1,12})(?:([KMGT])(?:i?B)?|B)?", text, re.IGNORECASE)
    if not found:
        raise ValueError(f"{text!r} is no size, such as 24G or 800M")
    power = " KMGT".index(found[2].upper()) if found[2] else 0
    return int(int(found[1]) * 1024**power)


def read_time(text: str) -> float:
    """Read a time such as 90, 10m or 1h30m (sshd_config(5), TIME FORMATS); the result is in seconds."""
    if not re.fullmatch(r"(?:[0-9]{1,9}[smhdw]?)+", text, re.IGNORECASE):
        raise ValueError(f"{text!r} is no time, such as 90s, 10m or 1h30m")
    units = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    parts = re.findall(r"([0-9]+)([smhdw]?)", text.lower())
    return float(sum(int(number) * units[unit] for number, unit in parts))


def read_flag(text: str) -> bool:
    """Read yes or no."""
    if text.lower() not in ("yes", "no", "true", "false"):
        raise ValueError(f"{text!r} is neither yes nor no")
    return text.lower() in ("yes", "true")


def read_gpus(text: str) -> list[int]:
    """Read the numbers of one or more GPUs, or `cpu`, which is none of them."""
    if text.lower() == "cpu":
        return []
    if not re.fullmatch(r"[0-9]{1,3}(,[0-9]{1,3})*", text):
        raise ValueError(f"{text!r} names no GPU: 0, or 0,1, or cpu")
    numbers = [int(number) for number in text.split(",")]
    if max(numbers) > 255 or len(set(numbers)) < len(numbers):
        raise ValueError(f"{text!r} names no GPU, or one twice")
    return numbers


def read_capabilities(text: str) -> list[str]:
    """Read one or more kinds of work, such as chat,embedding."""
    words = text.split(",")
    known = [capability.value for capability in Capability]
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return list(dict.fromkeys(words))


def read_price(text: str) -> float:
    """Read a price of zero or more."""
    if not re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text):
        raise ValueError(f"{text!r} is no price, such as 0.35")
    return float(text)


def read_url(text: str) -> str:
    """Read the http or https address of a server, without what only a person's own use of it needs."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(text)
        found = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        # The port is out of range, or a bracket is not closed.
        found = None
    if not found:
        raise ValueError(f"{text!r} is no address such as http://192.168.1.9:11434/v1")
    if parts.username or parts.password:
        raise ValueError(f"{text!r} holds a password, and an inventory is no place for one")
    return text.rstrip("/")


def read_source(text: str) -> str:
    """Read where a model comes from: file:PATH, https://ADDRESS or hf:OWNER/NAME/FILE."""
    if text.startswith("https://"):
        return read_url(text)
    if re.fullmatch(r"file:.+|hf:[\w.-]+/[\w.-]+(/[^\s]+)?", text):
        return text
    expected = "file:PATH, https://ADDRESS or hf:OWNER/NAME/FILE"
    if "://" in text or text.startswith(("file:", "hf:")):
        raise ValueError(f"{text!r} is no source of a model: {expected}")
    raise ValueError(f"{text!r} is no source of a model: {expected}; a file is written file:{text}")


def read_repository(text: str) -> str:
    """Read the address of a git repository; what git would take for an option or a command is refused."""
    plain = re.fullmatch(r"(https|ssh|file|git)://[^\s]+|/[^\s]+|[\w.-]+@[\w.-]+:[^\s]+", text)
    if not plain:
        raise ValueError(f"{text!r} is no repository, such as https://example.org/fleet.git or git@example.org:fleet")
    return text


NAME = Kind("NAME", _pattern(NAME_PATTERN, "name: letters, digits and . _ : @ + -, at most 96"))
WORKER_NAME = Kind("NAME", _pattern(WORKER_NAME_PATTERN, "name of a worker: small letters, digits and -, at most 40"))
HOST_NAME = Kind("NAME", _pattern(r"[A-Za-z0-9_][A-Za-z0-9._:-]{0,95}", "name of a machine"))
ADDRESS = Kind("NAME", _pattern(r"[A-Za-z0-9_:][A-Za-z0-9._:%-]{0,252}", "host name or IP address"))
LOGIN = Kind("NAME", _pattern(r"""[^-\s'"`$\\;&<>|(){}][^\s'"`$\\;&<>|(){}]{0,254}""", "user name"))
SYSTEM_USER = Kind("NAME", _pattern(r"[a-z_][a-z0-9_-]{0,31}", "name of a system user"))
WORD = Kind("WORD", _pattern(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "word of letters, digits and . _ -"))
OPTION = Kind("NAME", _pattern(r"[A-Za-z][A-Za-z0-9_.-]{0,63}", "name of an option"))
PROGRAM = Kind("PROGRAM", _pattern(r"/[\w./+-]+|[\w.+][\w.+-]*", "name or full path of a program"))
PATH = Kind("PATH", _pattern(r"[^-\0][^\0]*", "path"))
BRANCH = Kind("NAME", _pattern(r"(?!.*(\.\.|//|@\{|\.lock$))[\w][\w./+-]*(?<![./])", "name of a branch"))
SHA256 = Kind("64-HEX-DIGITS", _pattern(r"[0-9a-f]{64}", "SHA-256: 64 hexadecimal digits, small letters"))
PORT = Kind("PORT", _whole(1, 65535, "port from 1 to 65535"))
PORT_OR_NONE = Kind("PORT|none", read_port_or_none)
COUNT = Kind("NUMBER", _whole(1, 10**9, "whole number of at least 1"))
WAVE = Kind("NUMBER", _whole(0, 1000, "whole number from 0 to 1000"))
SIZE = Kind("SIZE", read_size)
TIME = Kind("TIME", read_time)
FLAG = Kind("yes|no", read_flag)
PRICE = Kind("PRICE", read_price)
GPUS = Kind("0|0,1|cpu", read_gpus)
URL = Kind("URL", read_url)
UPSTREAM_MODEL = Kind("NAME", _pattern(r"[A-Za-z0-9@][A-Za-z0-9._:@/+~-]{0,199}", "name of a model at a server"))
CAPABILITIES = Kind("chat,embedding…", read_capabilities)
SOURCE = Kind("file:PATH|https://ADDRESS|hf:OWNER/NAME/FILE", read_source)
REPOSITORY = Kind("ADDRESS", read_repository)
