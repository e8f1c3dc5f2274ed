"""Dialogues, and the text that the chat template in the model file makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

BOS = "<|bos|>"
EOS = "<|endoftext|>"
PAD = "<|pad|>"
TOOLS = "<|tools|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
TOOL = "<|tool|>"
CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"

CONTROL_TOKENS = (PAD, BOS, EOS, TOOLS, SYSTEM, USER, ASSISTANT, TOOL)
"""Never shown to a person; their order is their id."""
VISIBLE_TOKENS = (CALL_OPEN, CALL_CLOSE)
"""One token each, but part of the text that a server parses."""

TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")

Message = dict[str, Any]


def render(messages: Sequence[Message], tools: Sequence[Message] = ()) -> str:
    """Render as the server will, without asking for a further answer."""
    return _template().render(
        messages=messages, tools=list(tools), bos_token=BOS, eos_token=EOS, add_generation_prompt=False
    )


def user(content: str) -> Message:
    """Make a user message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """Make an assistant message of plain text."""
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    """Make a system message."""
    return {"role": "system", "content": content}


def tool_result(content: str) -> Message:
    """Make the message that carries a tool's result."""
    return {"role": "tool", "content": content}


def tool_call(name: str, arguments: dict[str, Any]) -> Message:
    """Make an assistant message that calls one tool."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
    }


def dump_json(value: Any) -> str:
    """Write JSON as llama.cpp's template engine does: spaced, insertion order, no escapes for HTML."""
    return json.dumps(value, ensure_ascii=False)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=False)  # a prompt is not HTML
    environment.filters["tojson"] = dump_json
    return environment.from_string(TEMPLATE_FILE.read_text("utf-8").rstrip("\n"))
