"""llama.cpp's own server as a worker engine, from the prebuilt wheel `xllamacpp`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import IO

from rbee.plugin import Capability, Endpoint, Feature, Loaded, ModelSpec, Progress, ServingBackend
from rbee_xllamacpp.settings import OPTIONS, Settings, settings

CLOSE_S = 2.0
LOG_LINES = 20


class XllamacppBackend(ServingBackend):
    """llama.cpp with continuous batching, in a process of its own (see `engine`)."""

    name = "xllamacpp"
    summary = "llama.cpp's server from a prebuilt wheel: GGUF models, several jobs at once"
    capabilities = frozenset({Capability.CHAT, Capability.COMPLETION, Capability.EMBEDDING, Capability.RERANK})
    features = frozenset(
        {
            Feature.RESPONSES,
            Feature.MESSAGES,
            Feature.TOOLS,
            Feature.JSON_SCHEMA,
            Feature.LOGPROBS,
            Feature.VISION,
        }
    )
    formats = frozenset({"gguf"})
    devices = frozenset({"cpu", "cuda", "metal", "rocm"})
    options = OPTIONS
    # It looks for a client that waits for a whole answer only after a second in which no job made a token.
    cancels_whole_answers = False

    def __init__(self) -> None:
        self._engine: subprocess.Popen[str] | None = None
        self._last_words: deque[str] = deque(maxlen=LOG_LINES)
        self._closing = threading.Event()

    @classmethod
    def check(cls) -> str | None:
        """Look for the wheel without importing it."""
        return None if find_spec("xllamacpp") else "the package xllamacpp is not installed; try: pip install xllamacpp"

    @classmethod
    def version(cls) -> str:
        """Return the wheel's version; it is named by the day of the llama.cpp in it."""
        try:
            return version("xllamacpp")
        except PackageNotFoundError:
            return ""

    def load(self, spec: ModelSpec, listen: Endpoint, progress: Progress) -> Loaded:
        """Start the engine's process and wait until it listens."""
        wanted = settings(spec, listen)
        engine = self._engine = _start(wanted, spec)
        threading.Thread(target=self._forward, args=(engine.stderr,), name="engine-log", daemon=True).start()
        if self._closing.is_set():
            self.close()
        assert engine.stdout is not None
        line = engine.stdout.readline()
        if not line:
            raise RuntimeError(self._epitaph(engine))
        report = json.loads(line)
        if "problem" in report:
            said = "; ".join(list(self._last_words)[-3:])
            raise RuntimeError(f"{report['problem']} ({said})" if said else report["problem"])
        return Loaded(wanted.slots, wanted.context_tokens or None, wanted.capabilities, wanted.features)

    def alive(self) -> bool:
        """Tell whether the engine's process runs."""
        return self._engine is not None and self._engine.poll() is None

    def close(self) -> None:
        """End the engine's process: ask by closing its stdin, then kill."""
        self._closing.set()
        engine = self._engine
        if engine is None:
            return
        assert engine.stdin is not None
        engine.stdin.close()
        try:
            engine.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            engine.kill()
            engine.wait()

    def _forward(self, log: IO[str] | None) -> None:
        """Pass the engine's log on and keep its last lines."""
        for line in log or ():
            self._last_words.append(line.strip()[:300])
            sys.stderr.write(line)
            sys.stderr.flush()

    def _epitaph(self, engine: subprocess.Popen[str]) -> str:
        code = engine.wait()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        said = "; ".join(list(self._last_words)[-3:])
        return f"the engine ended {how} while it loaded the model" + (f": {said}" if said else "")


def _start(wanted: Settings, spec: ModelSpec) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    if spec.gpus:
        gpus = ",".join(map(str, spec.gpus))
        environment |= {"CUDA_VISIBLE_DEVICES": gpus, "HIP_VISIBLE_DEVICES": gpus}
    # OpenMP's threads spin while they wait for each other. On a machine that has other work to do, each then spins away
    # the time in which the other would compute: 2.6 tokens/s were measured instead of 1655.
    environment.setdefault("GOMP_SPINCOUNT", "0")
    # glibc keeps an arena a thread, and the server has many threads that do little.
    environment.setdefault("MALLOC_ARENA_MAX", "2")
    engine = subprocess.Popen(
        [sys.executable, "-m", "rbee_xllamacpp.engine"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        # llama.cpp ends at a Ctrl+C of its terminal by itself; the worker has jobs to drain first.
        start_new_session=True,
    )
    assert engine.stdin is not None
    told = {"parent_pid": os.getpid(), "device": spec.device, "params": wanted.params}
    try:
        # The token goes through a pipe: a command line can be read by everyone on the machine.
        engine.stdin.write(json.dumps(told) + "\n")
        engine.stdin.flush()
    except BrokenPipeError:
        pass  # it died at once; `load` reads how
    return engine


__all__ = ["XllamacppBackend"]
