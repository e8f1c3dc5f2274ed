"""Run Rhai scripts from Python, with limits, a deadline and records that are converted once."""

from collections.abc import Mapping

from rhai._native import Engine, Frozen, Function, Record, Script, freeze
from rhai.errors import (
    ConversionError,
    Error,
    IntegerRangeError,
    InternalError,
    LimitError,
    MissingFunctionError,
    ParseError,
    ScriptRuntimeError,
)

Mapping.register(Record)

__all__ = [
    "ConversionError",
    "Engine",
    "Error",
    "Frozen",
    "Function",
    "IntegerRangeError",
    "InternalError",
    "LimitError",
    "MissingFunctionError",
    "ParseError",
    "Record",
    "Script",
    "ScriptRuntimeError",
    "freeze",
]
