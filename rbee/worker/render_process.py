"""The process in which a chat template runs: one line of JSON in, one out, within limits that the kernel holds."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

FORBIDDEN = ("ctypes.", "fcntl.", "mmap.", "os.", "pty.", "shutil.", "signal.", "socket.", "subprocess.", "urllib.")
IMPORTING = frozenset({"os.listdir", "os.scandir"})
"""What Python's own import does."""


class Refused(TemplateError):
    """The template itself refuses the messages (`raise_exception`)."""


def main() -> None:
    """Compile the template of the first line and render the conversations of the others."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    first = sys.stdin.readline()
    if not first:
        return  # the worker ended while this process started
    told = json.loads(first)
    _confine(told["memory_bytes"])
    template: Template | None = None
    for line in sys.stdin:
        # The alarm's default action ends this process, whatever it is doing, also inside one long C call.
        signal.setitimer(signal.ITIMER_REAL, told["time_s"])
        try:
            template = template or _compile(told["template"])
            answer = {"text": _render(template, told, json.loads(line))}
        except MemoryError:
            answer = {"problem": "it needs too much memory"}
        except Exception as problem:  # noqa: BLE001  a template may raise anything
            answer = {"problem": _words(problem)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), file=answers, flush=True)


def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals.pop("lipsum", None)
    # As transformers does it: models are trained on JSON that keeps letters and order as they are.
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}  # noqa: DTZ005
    return environment.from_string(template)


def _render(template: Template, told: dict[str, Any], question: dict[str, Any]) -> str:
    parts, size = [], 0
    for part in template.generate(**told["tokens"], **question):
        size += len(part)
        if size > told["max_chars"]:
            raise Refused(f"it writes more than {told['max_chars']} characters")
        parts.append(part)
    return "".join(parts)


def _confine(memory_bytes: int) -> None:
    """Take away what a template never needs, should one escape the sandbox all the same."""
    limits = {"RLIMIT_AS": memory_bytes, "RLIMIT_NOFILE": 32, "RLIMIT_NPROC": 0, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
    for name, value in limits.items():
        if hasattr(resource, name):
            number = getattr(resource, name)
            hard = resource.getrlimit(number)[1]
            bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(number, (bound, bound))
    # An audit hook stays for the life of the process (PEP 578).
    code = tuple({os.path.realpath(path) + os.sep for path in sys.path if path} | {sys.base_prefix + os.sep})
    sys.addaudithook(lambda event, arguments: _audit(event, arguments, code))


def _audit(event: str, arguments: tuple[Any, ...], code: tuple[str, ...]) -> None:
    """Refuse what leaves this process. Python reads modules as it needs them: those files alone may be opened."""
    if event == "open":
        path, mode, flags = arguments
        reads = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) == 0
        if not (reads and mode in ("r", "rb") and os.path.realpath(os.fsdecode(path)).startswith(code)):
            raise PermissionError("a chat template may not open files")
    elif event.startswith(FORBIDDEN) and event not in IMPORTING:
        raise PermissionError(f"a chat template may not use {event}")


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **ignored: Any) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise(message: str) -> NoReturn:
    raise Refused(message)


def _words(problem: Exception) -> str:
    text = " ".join(str(problem).split())[:300]
    return text if isinstance(problem, Refused) else f"{type(problem).__name__}: {text}"


if __name__ == "__main__":
    main()
