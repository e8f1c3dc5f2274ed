"""Every exception that this package raises.

Error
├── ParseError              the source is not valid Rhai
├── ScriptRuntimeError      the script failed while it ran, or a Python callable that it called did
│   └── MissingFunctionError    no function of that name takes these arguments
├── LimitError              a limit of the Engine was reached; `limit` names it
├── ConversionError         a value cannot cross between Python and Rhai (also a TypeError)
├── IntegerRangeError       an int does not fit in 64 bits (also an OverflowError)
└── InternalError           Rhai itself panicked; the process is unharmed
"""

from __future__ import annotations

from collections.abc import Sequence


class Error(Exception):
    """Base of every exception raised here.

    `line` and `column` count from 1 and are None where the place is not known. `source_name` is the name given to
    `Engine.compile`, or "prelude". `function` is the innermost script function that was running. `trace` holds the
    lines that ran before the error, if `Script.trace` raised it.

    Rhai keeps no position for a limit that is reached at run time: `line` is then that of the function that Python
    called.
    """

    trace: Sequence[int] = ()

    def __init__(
        self,
        message: str,
        *,
        line: int | None = None,
        column: int | None = None,
        source_name: str | None = None,
        function: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.column = column
        self.source_name = source_name
        self.function = function

    def __str__(self) -> str:
        place = [self.source_name or ("script" if self.line else ""), self.line, self.column]
        where = ":".join(str(part) for part in place if part)
        return f"{where}: {self.message}" if where else self.message


class ParseError(Error):
    """The source is not valid Rhai, or uses a symbol that is switched off."""


class ScriptRuntimeError(Error):
    """The script failed while it ran.

    `thrown` is the value of a `throw` statement, converted to Python, else None. A Python exception raised by a
    registered callable is in `__cause__`.
    """

    thrown: object = None


class MissingFunctionError(ScriptRuntimeError):
    """No function of that name takes these arguments; `signature` is what was called."""

    signature: str = ""


class LimitError(Error):
    """A limit was reached.

    `limit` is one of: operations, time, memory, calls, depth, stack, variables, functions, modules, string, array, map,
    source.
    """

    limit: str = ""


class ConversionError(Error, TypeError):
    """A value cannot cross between Python and Rhai."""


class IntegerRangeError(Error, OverflowError):
    """A Python int does not fit in Rhai's 64-bit signed integer."""


class InternalError(Error):
    """Rhai itself panicked. The script's result is lost; the process goes on."""
