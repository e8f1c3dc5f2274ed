"""A worker plugin that misbehaves on request; the tests install it by putting its folder on the path."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from rbee.plugin import (
    AnsweringBackend,
    Cancelled,
    Capability,
    FinishReason,
    Loaded,
    ModelSpec,
    Progress,
    Sampling,
    Token,
)


class Trial(AnsweringBackend):
    """Needs no model. `until` and `answer_until` name a file that ends the wait when it appears."""

    name = "trial"
    summary = "waits, fails and dies on request"
    capabilities = frozenset({Capability.CHAT})
    options = {
        "until": "load until this file exists",
        "answer_until": "answer until this file exists",
        "die": "end the process while loading: exit, print or kill",
        "child": "start a process, and write its number to this file",
    }

    def load(self, spec: ModelSpec, progress: Progress) -> Loaded:
        self._options = spec.options
        if "child" in spec.options:
            child = subprocess.Popen(["sleep", "600"])
            Path(spec.options["child"]).write_text(str(child.pid))
        if "die" in spec.options:
            _die(spec.options["die"])
        progress(0.25)
        if "until" in spec.options:
            _wait_for(spec.options["until"], lambda: False)
        return Loaded(slots=2, context_tokens=512)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return list(text.encode())

    def generate(
        self, prompt: Sequence[int], sampling: Sampling, cancelled: Cancelled
    ) -> Generator[Token, None, FinishReason]:
        yield Token(b"well,")
        if "answer_until" in self._options:
            _wait_for(self._options["answer_until"], cancelled)
        yield Token(b" done")
        return "stop"


class Files(Trial):
    """The same for model files."""

    name = "trial-files"
    formats = frozenset({"gguf"})
    capabilities = frozenset({Capability.CHAT, Capability.COMPLETION})


class Pictures(Trial):
    """An engine for GGUF files that does another kind of work."""

    name = "trial-pictures"
    formats = frozenset({"gguf"})
    capabilities = frozenset({Capability.IMAGE})


class Lame(Trial):
    """An engine that lacks something on this machine."""

    name = "trial-lame"

    @classmethod
    def check(cls) -> str | None:
        return "it lacks libtrial.so.1"


class Thief(Trial):
    """Has its own port taken by another program, once, just before the worker listens."""

    name = "trial-thief"

    @classmethod
    def check(cls) -> str | None:
        mark = Path(os.environ.get("TRIAL_THIEF", "/"))
        if "--spec" in sys.argv and not mark.exists():
            port = json.loads(Path(sys.argv[-1]).read_text())["port"]
            listen = (
                "import socket, time\n"
                f"with socket.create_server(('127.0.0.1', {port})):\n"
                "    print(flush=True)\n"
                "    time.sleep(600)\n"
            )
            command = [sys.executable, "-c", listen]
            other = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
            assert other.stdout is not None
            other.stdout.readline()
            mark.write_text(f"{other.pid} {port}")
        return None


def _die(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "print":
        print("\x1b[31mtrial: the file is damaged\x1b[0m\n", flush=True)
    os._exit(7)


def _wait_for(path: str, cancelled: Callable[[], bool]) -> None:
    while not os.path.exists(path) and not cancelled():
        time.sleep(0.01)
