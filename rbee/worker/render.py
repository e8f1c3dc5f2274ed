"""The one renderer of chat templates. A template comes with the model file, so it is a stranger's program.

It runs in Jinja's immutable sandbox, in a process of its own that may open no file, start no process, and use no more
than `MEMORY_BYTES` and `TIME_S`: the sandbox alone bounds neither time nor memory (CVE-2024-34359 and its siblings).
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rbee.errors import InvalidRequest, NotSupported, RbeeError
from rbee.wire.openai import Message

TIME_S = 1.0
START_S = 30.0
MEMORY_BYTES = 1024 * 1024 * 1024
MAX_OUTPUT_CHARS = 16 * 1024 * 1024
PLAIN = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For a model without a template: a transcript, which a model that only completes text can go on with."""


class Renderer:
    """Renders one model's template. Every method may be called from any thread; renders happen one by one."""

    def __init__(self, template: str | None, special_tokens: Mapping[str, str]) -> None:
        self._told = {
            "template": PLAIN if template is None else template,
            "tokens": dict(special_tokens),
            "time_s": TIME_S,
            "memory_bytes": MEMORY_BYTES,
            "max_chars": MAX_OUTPUT_CHARS,
        }
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def chat(self, messages: Sequence[Message]) -> str:
        """Return the prompt of a conversation.

        Raises: InvalidRequest when the template refuses the messages or breaks, NotSupported for parts but text.
        """
        turns = [_turn(message, f"messages[{index}]") for index, message in enumerate(messages)]
        with self._lock:
            answer = self._ask({"messages": turns, "add_generation_prompt": True})
        if "text" in answer:
            return str(answer["text"])
        raise InvalidRequest(f"The model's chat template failed: {answer['problem']}", param="messages")

    def start(self) -> None:
        """Start the process ahead of the first conversation."""
        with self._lock:
            if not self._closed and self._process is None:
                self._process = _start(self._told)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._closed = True
            self._end()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._closed:
            raise RbeeError("The worker is shutting down")
        process = self._process = self._process or _start(self._told)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            line = _read_line(process.stdout)
        except OSError:
            line = b""
        if line:
            return json.loads(line)  # type: ignore[no-any-return]  # written by our own process
        # The kernel ended it: the alarm, or the memory limit. The next render gets a new process.
        self._end()
        return {"problem": f"it did not end within {TIME_S:g} s and {MEMORY_BYTES >> 20} MiB"}

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]  # pipes were asked for


def _start(told: dict[str, Any]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "rbee.worker.render_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A Ctrl+C reaches every process of its terminal; the worker has conversations to drain first.
        start_new_session=True,
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once; whoever asks it something is told
        process.stdin.write(json.dumps(told).encode() + b"\n")
        process.stdin.flush()
    return process


def _read_line(pipe: IO[bytes]) -> bytes:
    """Read one line; the alarm in the process is what bounds a render, this bounds its start as well."""
    if not select.select([pipe], [], [], START_S)[0]:
        return b""
    return pipe.readline()


def _turn(message: Message, where: str) -> dict[str, Any]:
    """Return a message as templates expect it: content as one text, `developer` under its older name."""
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    turn["content"] = message.content if isinstance(message.content, str) else _text(message.content or [], where)
    names = ("name", "tool_calls", "tool_call_id")
    return turn | {name: value for name in names if (value := getattr(message, name)) is not None}


def _text(parts: Sequence[Mapping[str, Any]], where: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        if part.get("type") not in ("text", "input_text", "output_text", "refusal"):
            raise NotSupported(f"This engine takes no {part.get('type')}", param=f"{where}.content[{index}]")
        text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            raise InvalidRequest("a text part has no text", param=f"{where}.content[{index}].text")
        texts.append(text)
    return "\n".join(texts)
